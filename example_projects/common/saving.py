"""A run leaves off where it was: checkpoints while it goes on, and at Ctrl-C, which loses nothing."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint


class NotEndedError(Exception):
    """Time is up, and the run has left off where it can go on."""


def is_over(stop_at: float | None) -> bool:
    """Whether it is as late as that, in seconds since the epoch."""
    return stop_at is not None and time.time() >= stop_at


class Saving(Checkpoint):
    """Saves after every so many batches and at the end; at the first Ctrl-C too, after the batch, and then stops.

    What falls to the last batch of an epoch is saved when the epoch has ended, for Lightning does not make up for an
    epoch's validation, schedulers and callbacks if it resumes between that batch and them. At the second Ctrl-C the run
    stops at once. When time is up it stops as at Ctrl-C, unless it was just trained to its end.

    Args:
        path: of the checkpoint; what was there is replaced once the new one is whole.
        batches: between two checkpoints, however many optimizers take a step in each.
        stop_at: when time is up, in seconds since the epoch; never, if ``None``.
    """

    def __init__(self, path: Path, batches: int, stop_at: float | None = None) -> None:
        self.path, self.batches, self.stop_at = path, batches, stop_at
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
        late = is_over(self.stop_at) and not ended
        stop = trainer.strategy.reduce_boolean_decision(self.asked or late, all=False)
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if stop or ended or batches % self.batches == 0:
            trainer.save_checkpoint(self.path)
        if stop:
            if trainer.is_global_zero:
                print(f"\nStopped after step {batches}. The same command with --resume goes on from here.")
            raise KeyboardInterrupt if self.asked else NotEndedError(f"{self.path.parents[1]} has not ended")
