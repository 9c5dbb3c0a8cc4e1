"""What is measured: both translations, as far as there is a truth for them, and both ways back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from example_projects.common.evaluation import Evaluation, Metrics
from example_projects.common.image_module import Images


class RoundTripMetrics:
    """The metrics of both translations, and as ``cycle_<metric>`` those of images that went there and came back.

    A side is the domain that a translation starts from, as in the paper's Table 3: ``L1-A`` compares what was made of
    A's images with B's. Without a truth only distances between sets of images, which need none, are left of the
    translations' metrics. The way back is no substitute for them: generators that change nothing are perfect at it.

    Args:
        there: of the translations, by side, the one that is shown first.
        back: of the ways back, by side, without a distance.
        truth: whether there is one for every translation.
    """

    def __init__(self, there: Mapping[str, Metrics], back: Mapping[str, Metrics], *, truth: bool) -> None:
        self.there, self.back, self.truth = there, back, truth

    @property
    def names(self) -> list[str]:
        """What ``compute`` gives."""
        found = []
        for side in sorted(self.there):
            there, back = self.there[side].names, self.back[side].names
            known = [name for name in there if name != "n" and (self.truth or name not in back)]
            found += [f"{name}-{side}" for name in (*known, *(f"cycle_{name}" for name in back))]
        return [*found, *(["n"] if "n" in self.there[side].names else [])]

    def to(self, device: torch.device) -> object:
        """Move to the device on which images are compared."""
        for metrics in (*self.there.values(), *self.back.values()):
            metrics.to(device)
        return self

    def update(self, prediction: Tensor, truth: Tensor, side: str = "A") -> None:
        """Compare translations, [B, 3, H, W] in [-1, 1]."""
        self.there[side].update(prediction, truth)

    def update_cycle(self, again: Tensor, before: Tensor, side: str = "A") -> None:
        """Compare images that came back with what they were, [B, 3, H, W] in [-1, 1]."""
        self.back[side].update(again, before)

    def compute(self) -> dict[str, float]:
        """The metrics by name, ending in their side, of all images since ``reset``; of each side as many, "n"."""
        found: dict[str, float] = {}
        for side in sorted(self.there):
            there, back = self.there[side].compute(), self.back[side].compute()
            counted = {"n": there.pop("n")} if "n" in there else {}
            known = {name: value for name, value in there.items() if self.truth or name not in back}
            cycles = {f"cycle_{name}": value for name, value in back.items()}
            found |= {f"{name}-{side}": value for name, value in {**known, **cycles}.items()} | counted
        return found

    def reset(self) -> None:
        """Forget all images."""
        for metrics in (*self.there.values(), *self.back.values()):
            metrics.reset()


class RoundTripEvaluation(Evaluation):
    """Measures both translations, and how well images come back."""

    metrics: RoundTripMetrics

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Images, *args: Any, **kwargs: Any
    ) -> None:
        """Compare the batch."""
        here, made, there = outputs
        made_of_there = pl_module.bring_back(there)
        made_again = pl_module.generate((made_of_there, there)).outputs
        shown, other = self.metrics.there
        self.metrics.update(made.float(), there.float(), shown)
        self.metrics.update_cycle(pl_module.bring_back(made).float(), here.float(), shown)
        self.metrics.update(made_of_there.float(), here.float(), other)
        self.metrics.update_cycle(made_again.float(), there.float(), other)
