"""What is measured where there are several test sets: each by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from example_projects.common.evaluation import Evaluation
from example_projects.common.image_data import Test
from example_projects.common.image_metrics import ImageMetrics
from example_projects.common.image_module import Images

OF_SEVERAL = ("PSNR-Y", "SSIM-Y", "FID", "FD-VGG16", "n")  # what is reported of each of several sets


class MetricsBySet:
    """The metrics of one set of images under their names; of several sets as ``<set> <metric>``.

    Args:
        make: the metrics of a set.
        names: of the test sets; none, if there is one.
        validated: whether other images than these are measured first.
    """

    def __init__(self, make: Callable[[], ImageMetrics], names: Sequence[str], *, validated: bool = False) -> None:
        self.sets = {name: make() for name in ("", *names)}
        self.measured = list(names) if names and not validated else [""]

    @property
    def names(self) -> list[str]:
        """What ``compute`` gives."""
        if self.measured == [""]:
            return self.sets[""].names
        return [f"{name} {key}" for name in self.measured for key in OF_SEVERAL if key in self.sets[name].names]

    def to(self, device: torch.device) -> object:
        """Move to the device on which images are compared."""
        for metrics in self.sets.values():
            metrics.to(device)
        return self

    def begin(self, images: Test) -> None:
        """Measure these images from now on: several sets by name, or one."""
        self.measured = list(images) if isinstance(images, Mapping) else [""]
        self.reset()

    def update(self, prediction: Tensor, truth: Tensor, index: int = 0) -> None:
        """Compare images of a set by its place, [B, 3, H, W] in [-1, 1]."""
        self.sets[self.measured[index]].update(prediction, truth)

    def compute(self) -> dict[str, float]:
        """The metrics by name, of all images since ``reset``."""
        several = self.measured != [""]
        found = {
            f"{name} {key}" if several else key: value
            for name in self.measured
            for key, value in self.sets[name].compute().items()
        }
        return {name: found[name] for name in self.names}

    def reset(self) -> None:
        """Forget all images."""
        for metrics in self.sets.values():
            metrics.reset()


class EvaluationBySet(Evaluation):
    """Measures each test set by itself."""

    metrics: MetricsBySet

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew, with the images of this stage."""
        super().on_validation_epoch_start(trainer, pl_module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.metrics.begin(data.test if trainer.testing else data.validation)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Images,
        batch: Any = None,
        batch_idx: int = 0,
        dataloader_idx: int = 0,
    ) -> None:
        """Compare the batch."""
        self.metrics.update(outputs.outputs.float(), outputs.truths.float(), dataloader_idx)
