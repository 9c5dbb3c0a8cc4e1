"""The named losses that a trainer is about to differentiate, and in which step of which optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_mtadam import lightning_internals
from lightning_mtadam.balancer_slot import mtadam_of
from lightning_mtadam.balancers.balancer import parameters_in
from lightning_mtadam.callbacks.measured_step import MeasuredStep
from lightning_mtadam.collect import Batch
from lightning_mtadam.distributed.sharding import local
from lightning_mtadam.module import MultiTermLightningModule
from lightning_mtadam.terms import Losses

Given: TypeAlias = tuple[Losses, Optimizer | None]
"""Losses that an ordinary LightningModule has named, and whose they are, if that was said."""


@dataclass
class Followed:
    """An optimizer of the trainer, and its rhythm.

    Attributes:
        steps: how many of its steps have begun.
        due: the step, counted from 0, from which on the next report is due.
        step: what is known of the one that is under way.
        at: the trainer's count of steps when the last one began; an optimizer may evaluate a step several times.
    """

    steps: int = 0
    due: int = 0
    step: MeasuredStep | None = None
    at: int = -1

    @property
    def is_due(self) -> bool:
        """Whether the coming step, or the one under way, is to be reported."""
        return self.steps >= self.due

    def begin(self, optimizer: Optimizer) -> MeasuredStep:
        """The step that is under way; a new one, if there are no gradients: those before were dropped."""
        if self.step is None or not any(_is_something(parameter.grad) for parameter in parameters_in(optimizer)):
            self.step = MeasuredStep()
        return self.step

    def end(self, at: int) -> MeasuredStep | None:
        """The step whose gradients are complete, if it is to be reported; one that is evaluated again was counted."""
        if self.at == at:
            return None
        ended = (self.step or MeasuredStep()) if self.is_due else None
        self.step, self.steps, self.at = None, self.steps + 1, at
        return ended


@dataclass(frozen=True)
class Coming:
    """What is about to be differentiated.

    Attributes:
        losses: by name.
        optimizer: whose losses they are.
        balancer: what balances them: MTAdam, or a balancer; ``None`` if their sum is trained on.
        accumulated: by how many batches Lightning divides them.
    """

    losses: Losses
    optimizer: Optimizer
    balancer: Any
    accumulated: int

    def batch(self, trainer: pl.Trainer) -> Batch:
        """The losses with all that Lightning multiplies them by."""
        like, scale = next(iter(self.losses.values())), loss_scale(trainer)
        factor = torch.ones_like(like) if scale is None else scale
        parameters, model = parameters_in(self.optimizer), trainer.strategy.model
        return Batch(self.losses, parameters, model, factor.detach() / self.accumulated, scale)


def coming_losses(trainer: pl.Trainer, module: pl.LightningModule, given: Given | None) -> Coming | None:
    """The named losses that are about to be differentiated; ``None`` if none are known."""
    pending = module.pending if isinstance(module, MultiTermLightningModule) else None
    if pending is not None:
        return Coming(pending.losses, pending.optimizer, pending.balancer, pending.accumulated)
    if given is None:
        return None
    losses, optimizer = given
    if optimizer is None and len(trainer.optimizers) > 1:
        raise MisconfigurationException(
            f"There are {len(trainer.optimizers)} optimizers. Say whose losses these are: report_losses(self, losses,"
            " optimizer)."
        )
    optimizer = trainer.optimizers[0] if optimizer is None else lightning_internals.unwrap(optimizer)
    accumulated = trainer.accumulate_grad_batches if module.automatic_optimization else 1
    return Coming(losses, optimizer, mtadam_of(optimizer), accumulated)


def loss_scale(trainer: pl.Trainer) -> Tensor | None:
    """What a gradient scaler multiplies losses by, if there is one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.scale(torch.ones((), device=trainer.strategy.root_device))


def scale_left(trainer: pl.Trainer, optimizer: Optimizer) -> Tensor | None:
    """The part of ``p.grad`` that is a gradient scaler's, where the optimizer takes it out by itself: a fused one."""
    return loss_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else None


def _is_something(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(local(gradient).any())
