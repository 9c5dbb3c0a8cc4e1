"""Shows what the generator makes of the first images of the hold-out set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from example_projects.common.image_module import Images
from example_projects.common.images import grid, save_grid, to_image
from lightning_mtadam import lightning_internals
from lightning_mtadam.callbacks import tensorboard


class Samples(pl.Callback):
    """Writes a grid after every validation, to ``samples/`` and to TensorBoard: a row of input, output, truth each.

    Of large images it shows the middle. After testing, the whole images are written one by one to ``final/``.

    Args:
        folder: of the run.
        count: how many images are shown.
    """

    def __init__(self, folder: Path, count: int = 4) -> None:
        self.folder, self.count = folder, count
        self._rows: list[tuple[Tensor, ...]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._rows = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Images, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the first images."""
        self._rows += list(zip(*outputs, strict=True))[: self.count - len(self._rows)]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the grid."""
        if trainer.is_global_zero:
            save_grid(self._rows, self.folder / "samples" / f"epoch_{trainer.current_epoch + 1:04d}.png")
            for writer in tensorboard.writers(trainer.loggers):
                writer.add_image("samples", grid(self._rows), lightning_internals.logging_step(trainer))

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._rows = []

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Images, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the first images."""
        self.on_validation_batch_end(trainer, pl_module, outputs)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the images."""
        if trainer.is_global_zero:
            save_final(self._rows, self.folder / "final")


def save_final(rows: Sequence[Sequence[Tensor]], folder: Path) -> None:
    """Write each row's images as ``<row>_input.png``, ``<row>_output.png`` and ``<row>_truth.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, row in enumerate(rows):
        for name, image in zip(("input", "output", "truth"), row, strict=True):
            to_image(image).save(folder / f"{index}_{name}.png")
