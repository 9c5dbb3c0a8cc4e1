"""What is measured: the translation, as far as there is a truth for it, and the way back."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from example_projects.common.evaluation import Evaluation, Metrics
from example_projects.common.image_module import Images


class RoundTripMetrics:
    """The metrics of a translation, and as ``cycle_<metric>`` those of an image that went there and came back.

    Without a truth only distances between sets of images, which need none, are left of the translation's. The way back
    is no substitute for them: generators that change nothing are perfect at it.

    Args:
        there: of the translation.
        back: of the way back, without a distance.
        truth: whether there is one for every translation.
    """

    def __init__(self, there: Metrics, back: Metrics, *, truth: bool) -> None:
        self.there, self.back, self.truth = there, back, truth

    def to(self, device: torch.device) -> object:
        """Move to the device on which images are compared."""
        self.there.to(device)
        self.back.to(device)
        return self

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Compare translations, [B, 3, H, W] in [-1, 1]."""
        self.there.update(prediction, truth)

    def update_cycle(self, again: Tensor, before: Tensor) -> None:
        """Compare images that came back with what they were, [B, 3, H, W] in [-1, 1]."""
        self.back.update(again, before)

    def compute(self) -> dict[str, float]:
        """The metrics by name, of all images since ``reset``."""
        there, back = self.there.compute(), self.back.compute()
        known = {name: value for name, value in there.items() if self.truth or name not in back}
        return {**known, **{f"cycle_{name}": value for name, value in back.items()}}

    def reset(self) -> None:
        """Forget all images."""
        self.there.reset()
        self.back.reset()


class RoundTripEvaluation(Evaluation):
    """Measures also how well images come back."""

    metrics: RoundTripMetrics

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Images, *args: Any, **kwargs: Any
    ) -> None:
        """Compare the batch."""
        super().on_validation_batch_end(trainer, pl_module, outputs)
        self.metrics.update_cycle(pl_module.bring_back(outputs.outputs).float(), outputs.inputs.float())
