"""Stops a run that could not be right before its first batch, and all ranks when one has failed.

It also takes the state of a module's balancer to checkpoints and back: hooks of the module are the user's.
"""

from __future__ import annotations

import contextlib
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_mtadam import lightning_internals
from lightning_mtadam.balancers import Balancer
from lightning_mtadam.distributed.agreement import host_group, tell
from lightning_mtadam.distributed.processes import ALONE, Processes, processes_of
from lightning_mtadam.optim import MTAdam

CHECKPOINT_KEY = "lightning_mtadam_balancer"


class Guard(pl.Callback):
    """Every trainer of a ``MultiTermLightningModule`` has one; nothing in it depends on hooks of the user's module."""

    @classmethod
    def watch(cls, trainer: pl.Trainer) -> None:
        """Give the trainer a guard, if it has none."""
        if not any(isinstance(callback, cls) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.insert(0, cls())  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if the strategy is none under which the losses can be balanced."""
        balancer, mtadam = balancer_of(pl_module), any(isinstance(one, MTAdam) for one in trainer.optimizers)
        if balancer is not None:
            if mtadam:
                raise MisconfigurationException(
                    f"configure_balancer returns {type(balancer).__name__}, but MTAdam balances the losses by itself."
                    " Return None from configure_balancer, or another optimizer from configure_optimizers."
                )
            balancer.attach(pl_module)
        if mtadam or balancer is not None:
            lightning_internals.check_strategy(trainer)
            group = _processes(trainer).group
            if group is not None:
                host_group(group)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the balancer's state."""
        balancer = balancer_of(pl_module)
        if balancer is not None:
            checkpoint[CHECKPOINT_KEY] = balancer.state_dict()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the balancer's state where training goes on; the first to raise if it is another's."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        balancer, saved = balancer_of(pl_module), checkpoint.get(CHECKPOINT_KEY)
        if balancer is None and saved is not None:
            raise ValueError(
                f"The checkpoint was made with the balancer {saved['balancer']}, but the module has none. Return it"
                " from configure_balancer, or load only the weights."
            )
        if balancer is not None and saved is not None:
            balancer.load_state_dict(saved)
        elif balancer is not None:
            rank_zero_warn(f"The checkpoint was made without a balancer: {type(balancer).__name__} starts anew.")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the other ranks, which would wait for this one."""
        with contextlib.suppress(ValueError):  # the strategy is none under which anyone waits
            group = _processes(trainer).group
            if group is not None:
                tell(exception, group)


def balancer_of(module: pl.LightningModule) -> Balancer | None:
    """The balancer of a module, if it can have one, and has."""
    balancer = getattr(module, "balancer", None)
    return balancer if isinstance(balancer, Balancer) else None


def _processes(trainer: pl.Trainer) -> Processes:
    """The processes that train the parameters of the trainer's MTAdam, or of what its module's balancer is for."""
    balanced = balancer_of(trainer.lightning_module) is not None
    for optimizer in trainer.optimizers:
        if balanced or isinstance(optimizer, MTAdam):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            return processes_of(trainer.strategy.model, parameters)
    return ALONE
