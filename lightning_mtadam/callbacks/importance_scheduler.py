"""Changes the importance of terms while a trainer trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_mtadam import balancers, lightning_internals
from lightning_mtadam.balancer_slot import balancer_of
from lightning_mtadam.balancers import Balancer
from lightning_mtadam.callbacks.readings import named_optimizers
from lightning_mtadam.module import MultiTermLightningModule
from lightning_mtadam.optim import MTAdam
from lightning_mtadam.terms import check_names, kind_of, plain, unknown_name_message

Schedule = Callable[[int], float]


class ImportanceScheduler(pl.Callback):
    """Set the importance of terms to a function of the step or the epoch, from the first backward pass on.

    It calls ``set_importance`` of MTAdam, or of a balancer that has it, before a backward pass. Any function will do: a
    ramp, a cycle, a table that is looked up. A resumed run goes on at the right count. Each value is logged as
    ``importance/<term>`` to every logger of the trainer: where it logs, or at the end of every epoch.

    Steps are those of the optimizer whose terms are weighed, as it counts them: not batches that accumulate, nor the
    steps of other optimizers, nor steps that were skipped as not finite. With several optimizers each takes the terms
    that are its own; tags then begin as ``importance-MTAdam/`` and ``importance-MTAdam-1/``. All processes do the same.

    Args:
        schedule: by term a function of the number of steps, or epochs, that are done: 0 at first. It returns a finite
            number of at least 0; a tensor of one element will do. It must be a function of this number alone, or
            processes may differ, which raises, and a resumed run is another one.
        interval: "step" or "epoch".

    Raises:
        TypeError: something is no function, or returns no number; nothing in the trainer has an importance to set.
        ValueError: no terms, an unknown interval, a value that is negative, inf or nan, a name that is no term's.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_mtadam.callbacks import ImportanceScheduler
        >>> warm_up = ImportanceScheduler({"kl": lambda step: min(1.0, step / 1000)})
        >>> trainer = Trainer(callbacks=[warm_up], accelerator="cpu")
    """

    def __init__(self, schedule: Mapping[str, Schedule], interval: Literal["step", "epoch"] = "step") -> None:
        if not isinstance(schedule, Mapping):
            raise TypeError(
                f"schedule must be a mapping of terms' names to functions, but is {kind_of(schedule)}. Write"
                " {'kl': lambda step: min(1.0, step / 1000)}."
            )
        check_names(schedule)
        if not schedule:
            raise ValueError("schedule is empty. Give a function for one term at least.")
        for name, function in schedule.items():
            if not callable(function):
                raise TypeError(
                    f"schedule[{name!r}] must be a function of the number of steps, but got {function!r}. A constant"
                    f" is given to the optimizer: MTAdam(..., importance={{{name!r}: ...}})."
                )
        if interval not in ("step", "epoch"):
            raise ValueError(f"interval must be 'step' or 'epoch', but got {interval!r}.")
        self.schedule, self.interval = dict(schedule), interval
        self._targets: dict[str, Any] = {}  # what has an importance to set, by the first part of its tags
        self._done: dict[str, tuple[int, tuple[str, ...]]] = {}  # what was set last: at which count, which terms
        self._values: dict[str, float] = {}  # by tag
        self._steps = 0  # of the optimizer that a balancer balances, in manual optimization
        self._balanced: Optimizer | None = None

    @property
    def state_key(self) -> str:
        """Schedulers of other terms have a state of their own in checkpoints."""
        return self._generate_state_key(terms=sorted(self.schedule), interval=self.interval)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what has an importance to set, or raise."""
        balancer, optimizers = balancer_of(pl_module), dict(named_optimizers(trainer.optimizers))
        found: dict[str, Any] = {} if balancer is None else {"importance": balancer}
        found = {tag.replace("balance_weight", "importance"): one for tag, one in optimizers.items()} | found
        self._targets = {tag: one for tag, one in found.items() if hasattr(one, "set_importance")}
        self._done, self._values, self._balanced = {}, {}, None
        if not self._targets:
            names = [type(one).__name__ for one in (*found.values(), *trainer.optimizers)]
            able = [name for name in balancers.__all__ if hasattr(getattr(balancers, name), "set_importance")]
            raise TypeError(
                f"ImportanceScheduler needs something that has an importance, but there is only {names}. Return"
                " MTAdam(self.named_parameters()) from configure_optimizers, or from configure_balancer one of"
                f" {able}; or leave the callback out."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Set it where the terms are known; the training step may differentiate losses by itself."""
        for tag, target in self._targets.items():
            self._set(trainer, tag, target.terms)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Set it for the losses that are about to be differentiated."""
        pending: Any = pl_module.pending if isinstance(pl_module, MultiTermLightningModule) else None
        for tag, target in self._targets.items():
            if pending is not None and pending.balancer is target:
                self._set(trainer, tag, target.terms or tuple(pending.losses))
                self._balanced = pending.optimizer if isinstance(target, Balancer) else self._balanced

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Count the steps of the optimizer that a balancer balances; an MTAdam counts its own."""
        self._steps += lightning_internals.unwrap(optimizer) is self._balanced

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Log after an optimizer step, with steps as the interval."""
        self._check_names()
        if self.interval == "step" and lightning_internals.should_log(trainer):
            self._log(trainer, lightning_internals.logging_step(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log at the end of an epoch, with epochs as the interval."""
        if self.interval == "epoch":
            self._log(trainer, lightning_internals.logging_step(trainer) - 1)

    def state_dict(self) -> dict[str, Any]:
        """The steps that it has counted itself; what MTAdam and the trainer count is in the checkpoint already."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self._steps = state_dict["steps"]

    def _set(self, trainer: pl.Trainer, tag: str, known: Sequence[str]) -> None:
        """Set the importance of those terms of the schedule that are among the ``known``; of one target of all."""
        target, alone = self._targets[tag], len(self._targets) == 1
        names = tuple(name for name in self.schedule if alone or name in known)
        count = self._count(trainer, target)
        if not names or self._done.get(tag) == (count, names):
            return
        values = {name: self._value(name, count) for name in names}
        target.set_importance(values)
        self._done[tag] = count, names
        self._values |= {f"{tag}/{name}": value for name, value in values.items()}

    def _count(self, trainer: pl.Trainer, target: Any) -> int:
        if self.interval == "epoch":
            return trainer.current_epoch
        if isinstance(target, MTAdam):
            return int(target.param_groups[0]["steps"])
        return trainer.global_step if trainer.lightning_module.automatic_optimization else self._steps

    def _value(self, name: str, count: int) -> float:
        value = plain(self.schedule[name](count))
        if not isinstance(value, Real):
            raise TypeError(f"schedule[{name!r}]({count}) must return a number, but returned {kind_of(value)}.")
        if not 0 <= float(value) < math.inf:
            raise ValueError(
                f"schedule[{name!r}]({count}) must return a finite number of at least 0, but returned {value!r}."
            )
        return float(value)

    def _check_names(self) -> None:
        """Raise if a term of the schedule is none of any target's, once all of these know their terms."""
        unmatched = self.schedule.keys() - {name for _, names in self._done.values() for name in names}
        if unmatched and all(target.terms for target in self._targets.values()):
            terms = [term for target in self._targets.values() for term in target.terms]
            raise ValueError(unknown_name_message("schedule", sorted(unmatched)[0], terms))

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        for logger in trainer.loggers if self._values else ():
            logger.log_metrics(self._values, step=step)
