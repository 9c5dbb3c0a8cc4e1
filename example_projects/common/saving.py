"""A run leaves off where it was: checkpoints while it goes on, and at Ctrl-C, which loses nothing."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint


class Saving(Checkpoint):
    """Saves after every so many batches and at the end; at the first Ctrl-C too, after the batch, and then stops.

    What falls to the last batch of an epoch is saved when the epoch has ended, for Lightning does not make up for an
    epoch's validation, schedulers and callbacks if it resumes between that batch and them. At the second Ctrl-C the run
    stops at once.

    Args:
        path: of the checkpoint; what was there is replaced once the new one is whole.
        batches: between two checkpoints, however many optimizers take a step in each.
    """

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches
        self.asked = False
        self._before: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if it is time and there are more batches in the epoch."""
        if batch_idx + 1 < trainer.num_training_batches:
            self._save(trainer, ended=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, if it was time at the last batch or there are no more epochs."""
        self._save(trainer, ended=trainer.current_epoch + 1 == trainer.max_epochs)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop listening."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _save(self, trainer: pl.Trainer, *, ended: bool) -> None:
        stop = trainer.strategy.reduce_boolean_decision(self.asked, all=False)
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if stop or ended or batches % self.batches == 0:
            trainer.save_checkpoint(self.path)
        if stop:
            if trainer.is_global_zero:
                print(f"\nStopped after step {batches}. The same command with --resume goes on from here.")
            raise KeyboardInterrupt
