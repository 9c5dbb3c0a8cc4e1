"""Continue a run in the middle of an epoch exactly: the order of the data and the random numbers are restored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A random order that depends on the seed and the epoch alone, and skips what a resumed run has seen.

    Of several processes each takes its share, so that together they see in every batch what one process with a batch
    size as many times as large would see.

    Args:
        size: the number of samples.
        batch_size: the batch size of each process.
        seed: of the order.
        trainer: knows the epoch and how many of its batches are done.
    """

    def __init__(self, size: int, batch_size: int, seed: int, trainer: pl.Trainer) -> None:
        self.size, self.batch_size, self.seed, self.trainer = size, batch_size, seed, trainer

    def __len__(self) -> int:
        return self.size // self.trainer.world_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.trainer.current_epoch)
        order = torch.randperm(self.size, generator=generator)
        share = order[self.trainer.global_rank :: self.trainer.world_size][: len(self)]
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready * self.batch_size
        return iter(share[done:].tolist())


class RandomState(pl.Callback):
    """Keeps the random numbers' state in the checkpoint, so that dropout goes on as it would have."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The state now, of the CPU and of every GPU that this process sees."""
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts: setting up uses random numbers too."""
        self._restored = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the state, once."""
        if self._restored:
            torch.set_rng_state(self._restored["cpu"].cpu())
            torch.cuda.set_rng_state_all([state.cpu() for state in self._restored["cuda"]])
            self._restored = {}
