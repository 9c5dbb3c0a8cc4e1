"""Stops a run that could not be right before its first batch, and all ranks when one has failed."""

from __future__ import annotations

import contextlib

import lightning.pytorch as pl

from lightning_mtadam import lightning_internals
from lightning_mtadam.distributed.agreement import host_group, tell
from lightning_mtadam.distributed.processes import ALONE, Processes, processes_of
from lightning_mtadam.optim import MTAdam


class Guard(pl.Callback):
    """Every trainer of a ``MultiTermLightningModule`` has one; nothing in it depends on hooks of the user's module."""

    @classmethod
    def watch(cls, trainer: pl.Trainer) -> None:
        """Give the trainer a guard, if it has none."""
        if not any(isinstance(callback, cls) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.insert(0, cls())  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if the strategy is none under which MTAdam works."""
        if any(isinstance(optimizer, MTAdam) for optimizer in trainer.optimizers):
            lightning_internals.check_strategy(trainer)
            group = _processes(trainer).group
            if group is not None:
                host_group(group)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the other ranks, which would wait for this one."""
        with contextlib.suppress(ValueError):  # the strategy is none under which anyone waits
            group = _processes(trainer).group
            if group is not None:
                tell(exception, group)


def _processes(trainer: pl.Trainer) -> Processes:
    """The processes that train the parameters of the trainer's MTAdam."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, MTAdam):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            return processes_of(trainer.strategy.model, parameters)
    return ALONE
