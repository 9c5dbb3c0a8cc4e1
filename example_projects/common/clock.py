"""How long training takes."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl


class TrainingClock(pl.Callback):
    """Measures the wall time of training, data loading included, validation not.

    Attributes:
        seconds: so far, in this process.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def on_train_start(self, *_: Any) -> None:
        """Start."""
        self._since = time.perf_counter()

    def on_validation_start(self, *_: Any) -> None:
        """Stop."""
        self.seconds += time.perf_counter() - self._since

    def on_validation_end(self, *_: Any) -> None:
        """Go on."""
        self.on_train_start()

    def on_train_end(self, *_: Any) -> None:
        """Stop."""
        self.on_validation_start()
