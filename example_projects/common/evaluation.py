"""Measures the hold-out set, during training and after it, and keeps the curve of every metric."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor

from example_projects.common import report
from example_projects.common.curves import draw_curves
from example_projects.common.image_module import Images

BETWEEN_DRAWINGS = 60.0  # seconds: a drawing takes longer than a small epoch


class Metrics(Protocol):
    """Compares images, batch by batch, over all processes."""

    @property
    def names(self) -> Sequence[str]:
        """What ``compute`` gives."""

    def to(self, device: torch.device) -> object:
        """Move to the device on which images are compared."""

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Compare images, [B, 3, H, W] in [-1, 1]."""

    def compute(self) -> dict[str, float]:
        """The metrics by name, of all images since ``reset``."""

    def reset(self) -> None:
        """Forget all images."""


class Evaluation(pl.Callback):
    """Logs ``val/<metric>`` after every validation and ``test/<metric>`` at the end.

    The values of all epochs are in ``curve.csv``, drawn in ``curves.png`` when training ends or is interrupted, and in
    between once a minute. They are part of the checkpoint, so that a resumed run has those before it too. The metrics
    and their networks belong to this callback and not to the module: they are neither trained nor saved.

    Args:
        folder: of the run.
        metrics: what to measure.
    """

    def __init__(self, folder: Path, metrics: Metrics) -> None:
        self.folder, self.metrics = folder, metrics
        self.history: list[dict[str, float]] = []
        self._drawn = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The metrics so far."""
        return {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.history = list(state_dict["history"])

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self.metrics.to(pl_module.device)
        self.metrics.reset()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Images, *args: Any, **kwargs: Any
    ) -> None:
        """Compare the batch."""
        self.metrics.update(outputs.outputs.float(), outputs.truths.float())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the metrics and, if it is time, draw their curves."""
        values = self._log(pl_module, "val")
        self.history.append({"epoch": trainer.current_epoch + 1, **values})
        if trainer.is_global_zero:
            report.write_csv(self.folder / "curve.csv", self.history)
            if time.monotonic() - self._drawn > BETWEEN_DRAWINGS:
                self._draw(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curves."""
        self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw the curves as far as they go."""
        self._draw(trainer)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Images, *args: Any, **kwargs: Any
    ) -> None:
        """Compare the batch."""
        self.on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the metrics."""
        self._log(pl_module, "test")

    def _draw(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self.history:
            draw_curves({"": self.history}, self.folder / "curves.png")
            self._drawn = time.monotonic()

    def _log(self, pl_module: pl.LightningModule, stage: str) -> dict[str, float]:
        values = self.metrics.compute()
        # They are the same on all processes: their mean over them changes nothing.
        pl_module.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)
        return values
