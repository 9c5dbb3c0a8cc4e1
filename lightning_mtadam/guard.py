"""Stops a run that could not be right before its first batch or at it, and all ranks when one has failed.

It also takes the state of a module's balancer to checkpoints and back: hooks of the module are the user's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_mtadam import lightning_internals
from lightning_mtadam.balancer_slot import CHECKPOINT_KEY, BalancerSlot, balancer_of, mtadam_of
from lightning_mtadam.balancers.balancer import Balancer, parameters_in
from lightning_mtadam.distributed.agreement import host_group
from lightning_mtadam.distributed.averaging import Averaging, devices_of
from lightning_mtadam.distributed.processes import COMM_HOOK, FSDP1, processes_of
from lightning_mtadam.distributed.sharding import mesh_of
from lightning_mtadam.optim import MTAdam
from lightning_mtadam.roots import refuse_other_callbacks
from lightning_mtadam.terms import kind_of, warn, what_instead

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Guard(pl.Callback):
    """Every trainer of a ``MultiTermLightningModule`` has one; nothing in it depends on hooks of the user's module."""

    def __init__(self) -> None:
        self._written: list[bool] = []  # whether MTAdam wrote the states of the checkpoint that is being loaded

    @classmethod
    def watch(cls, trainer: pl.Trainer) -> None:
        """Give the trainer a guard, if it has none."""
        if not any(isinstance(callback, cls) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.insert(0, cls())  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if the strategy is none under which the losses can be balanced."""
        balancer = balancer_of(pl_module)
        if balancer is not None:
            if any(mtadam_of(optimizer) is not None for optimizer in trainer.optimizers):
                raise MisconfigurationException(
                    f"configure_balancer returns {type(balancer).__name__}, but MTAdam balances the losses by itself."
                    " Return None from configure_balancer, or another optimizer from configure_optimizers."
                )
            balancer.attach(pl_module)
        if pl_module is not None and pl_module.automatic_optimization:
            for optimizer in trainer.optimizers:
                _refuse_part(optimizer)
        written, self._written = self._written, []
        for optimizer, by_mtadam in zip(trainer.optimizers, written, strict=False):
            if by_mtadam and "terms" not in optimizer.param_groups[0]:
                raise ValueError(
                    f"The checkpoint was written with MTAdam, but configure_optimizers returns"
                    f" {type(optimizer).__name__}, to which its state means nothing. Return MTAdam; or load only the"
                    f" weights, {type(pl_module).__name__}.load_from_checkpoint(path), and fit() without ckpt_path."
                )
        if _balanced_parameters(trainer):
            _check_strategy(trainer)
            group = _group(trainer)
            if group is not None:
                host_group(group)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the balancer, before a checkpoint is written."""
        balancer = balancer_of(pl_module)
        if balancer is not None:
            balancer.end_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell of a last step that was not finite: on an accelerator no later step does."""
        for optimizer in trainer.optimizers:
            mtadam = mtadam_of(optimizer)
            if mtadam is not None:
                mtadam.synchronize()

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
        states = [state.get("param_groups") for state in checkpoint.get("optimizer_states", [])]
        self._written = [bool(groups) and "terms" in groups[0] for groups in states]
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
            group = _group(trainer)
            if group is not None:
                Averaging(group, devices_of(_balanced_parameters(trainer))).fail(exception)


class TrainerGuard(pl.Callback):
    """Raises where nothing else of the package would be asked: see ``callbacks_of_trainers`` in the package."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise if a callback is for trainers of the other package of Lightning."""
        refuse_other_callbacks(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if ``configure_balancer`` belongs to a plain LightningModule."""
        name = type(pl_module).__name__
        if hasattr(pl_module, "configure_balancer") and not isinstance(pl_module, BalancerSlot):
            raise MisconfigurationException(
                f"{name} has configure_balancer, but is a plain LightningModule, which never calls it: it would train"
                f" without a balancer. Write class {name}(MultiTermLightningModule), and return a dict of named losses"
                " from training_step."
            )


def check_output(output: object, balancer: MTAdam | Balancer | None) -> None:
    """Raise ``TypeError`` unless the ``output`` of a training step holds losses, as its ``balancer`` needs them.

    One loss is none to balance: a :class:`Balancer` refuses it. MTAdam is then Adam.
    """
    remedy = "Return a dict of named scalar losses, e.g. {'reconstruction': loss, 'kl': kl}"
    if not isinstance(output, Mapping | Tensor):
        item = " Do not call .item() on a loss." if isinstance(output, Number) else ""
        other = "one loss as a tensor; or None to skip the batch"
        raise TypeError(f"training_step returned {kind_of(output)}. {remedy}; {other}.{item}")
    if isinstance(output, Mapping) and "loss" not in output:
        return
    if isinstance(output, Mapping) and not isinstance(output["loss"], Tensor):
        raise TypeError(f"training_step returned {tuple(output)}: 'loss' {what_instead('loss', output['loss'])}")
    if isinstance(balancer, Balancer):
        what = f"{tuple(output)}, one loss" if isinstance(output, Mapping) else "one loss, a Tensor"
        beside = terms_beside(output) if isinstance(output, Mapping) else []
        raise TypeError(
            f"{type(balancer).__name__} balances named losses, but training_step returned {what}."
            f" {_by_their_names(beside) if beside else remedy + '.'} Or return no balancer from configure_balancer."
        )


def refuse_accumulated_lbfgs(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` for LBFGS where several batches make one step."""
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "With accumulate_grad_batches above 1 LBFGS would compare the values of the last batch with gradients of"
            " all batches, and of all its evaluations. Make the batches larger instead, with accumulate_grad_batches=1."
        )


def terms_beside(losses: Mapping[str, object]) -> list[str]:
    """The names of what lies beside the key "loss" and has a graph, as if it were a term."""
    return [name for name, value in losses.items() if name != "loss" and _holds_loss(value)]


def tell_of_terms_beside(losses: Mapping[str, object], *, named: bool) -> bool:
    """Warn if there is a "loss", with what look like its terms beside it; gives whether it did.

    Args:
        losses: what was returned, or given.
        named: whether "loss" is trained beside the others; else alone.
    """
    names = terms_beside(losses) if "loss" in losses else []
    if names and named:
        warn(
            f"backward_terms was given {tuple(losses)}: 'loss' is one more term, beside the others."
            f" {_by_their_names(names)}"
        )
    elif names:
        warn(
            f"training_step returned {tuple(losses)}: of these Lightning trains 'loss' alone, as one term, so that"
            f" MTAdam has nothing to balance. {_by_their_names(names)} Detach what is only to be looked at."
        )
    return bool(names)


def _by_their_names(names: Sequence[str]) -> str:
    terms = ", ".join(f"{name!r}: {name}" for name in names)
    return (
        f"Give the terms by their names and leave out their sum, e.g. {{{terms}}}. If 'loss' is no sum but one of the"
        f" terms, call it otherwise: {{'main': loss, {terms}}}."
    )


def _holds_loss(value: object) -> bool:
    """Whether it is a single number with a graph, or holds one."""
    if isinstance(value, Tensor):
        return value.requires_grad and value.numel() == 1
    held = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(_holds_loss, held))


def _refuse_part(optimizer: Optimizer) -> None:
    """Raise if the optimizer holds an MTAdam that does not train all it trains, which nobody would give the losses."""
    items = [one for held in vars(optimizer).values() for one in (held if isinstance(held, list | tuple) else [held])]
    if mtadam_of(optimizer) is None and any(isinstance(one, MTAdam) for one in items):
        raise MisconfigurationException(
            f"{type(optimizer).__name__} holds an MTAdam that trains only some of its parameters, and so cannot balance"
            " the losses for all of them. Give MTAdam all parameters; or, to balance what several optimizers train,"
            " put AdamW in its place, and return a balancer from configure_balancer, e.g."
            " SharedLayerBalancer('decoder')."
        )


def _balanced_parameters(trainer: pl.Trainer) -> list[Tensor]:
    """What the trainer's MTAdam trains, or the optimizer that its module's balancer is for; empty if there is none."""
    balanced = balancer_of(trainer.lightning_module) is not None
    for optimizer in trainer.optimizers:
        if balanced or mtadam_of(optimizer) is not None:
            return parameters_in(optimizer)
    return []


def _group(trainer: pl.Trainer) -> ProcessGroup | None:
    """The processes that train those parameters together, if there are several."""
    parameters = _balanced_parameters(trainer)
    return processes_of(trainer.strategy.model, parameters).group if parameters else None


def _check_strategy(trainer: pl.Trainer) -> None:
    """Raise if the gradients of single terms cannot be had under the trainer's strategy.

    Raises:
        MisconfigurationException: with the reason, and what to do instead.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(FSDP1)
    if lightning_internals.has_comm_hook(strategy):
        raise MisconfigurationException(COMM_HOOK)
    if isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            "DeepSpeed runs backward and the optimizer by itself, on one loss. Use strategy='ddp', or, to shard"
            " parameters and states, ModelParallelStrategy() with fully_shard."
        )
    if trainer.world_size > 1 and not isinstance(strategy, (DDPStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"MTAdam does not support {type(strategy).__name__}, where it cannot average the gradients of the terms"
            " over the processes. Use strategy='ddp' or ModelParallelStrategy(), or another optimizer."
        )
    if trainer.world_size > 1 and isinstance(strategy, ModelParallelStrategy):
        parameters = [parameter for optimizer in trainer.optimizers for parameter in parameters_in(optimizer)]
        if mesh_of(parameters) is None:
            raise MisconfigurationException(
                "No parameter is sharded, so every process would train alone. Call fully_shard in configure_model, on"
                " the whole network last; or use strategy='ddp'."
            )
