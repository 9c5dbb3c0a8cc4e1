"""One checkpoint, written anew every so many batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint


class SaveEvery(Checkpoint):
    """Saves after every so many batches, however many optimizers took a step in each.

    Args:
        path: of the checkpoint; what was there is replaced once the new one is whole.
        batches: between two checkpoints.
    """

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Save, if it is time."""
        if (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % self.batches == 0:
            trainer.save_checkpoint(self.path)
