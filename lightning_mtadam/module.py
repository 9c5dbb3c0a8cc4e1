"""The LightningModule whose ``training_step`` returns named losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_mtadam import lightning_internals
from lightning_mtadam.balancer_slot import BalancerSlot, mtadam_of
from lightning_mtadam.balancers import Balancer
from lightning_mtadam.collect import as_losses
from lightning_mtadam.guard import Guard
from lightning_mtadam.optim import MTAdam
from lightning_mtadam.terms import HAS_GRAPH, Losses, check_losses, warn

_ACCUMULATED_LBFGS = (
    "With accumulate_grad_batches above 1 LBFGS would compare the values of the last batch with gradients of all"
    " batches, and of all its evaluations. Make the batches larger instead, with accumulate_grad_batches=1."
)


@dataclass(frozen=True)
class _PendingLosses:
    """The losses of a training step between the forward and the backward pass.

    Attributes:
        losses: the terms, with their graphs.
        total: their sum; what Lightning scales and passes to ``backward`` derives from it.
        accumulated: by how many batches Lightning divides.
        optimizer: whose gradients are wanted.
        balancer: makes one gradient of them: MTAdam, or a balancer; ``None`` if their sum is wanted.
        result: whose ``loss`` the closure returns to the optimizer.
    """

    losses: Losses
    total: Tensor
    accumulated: int
    optimizer: Optimizer
    balancer: MTAdam | Balancer | None
    result: ClosureResult


class MultiTermLightningModule(BalancerSlot, pl.LightningModule):
    """A LightningModule for training on several losses.

    ``training_step`` returns a dict of named scalar losses. With :class:`~lightning_mtadam.optim.MTAdam` as optimizer,
    one backward pass per term is run and the step is balanced; with any other optimizer the module trains on the plain
    sum of the terms. A tensor, or a dict with the key "loss", is treated as in every LightningModule. Accumulation,
    gradient clipping, schedulers and callbacks work as ever; clipping acts on the balanced gradient.

    The terms are logged as ``train/<term>``, their sum as ``train/loss``, on the progress bar.

    Attributes:
        log_terms: set it to False to log nothing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_mtadam import MTAdam, MultiTermLightningModule
        >>> class Autoencoder(MultiTermLightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.decoder = nn.Linear(8, 2), nn.Linear(2, 8)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         code = self.encoder(batch)
        ...         error = self.decoder(code) - batch
        ...         return {"reconstruction": error.square().mean(), "code": code.square().mean()}
        ...
        ...     def configure_optimizers(self):
        ...         return MTAdam(self.named_parameters(), lr=1e-2)
    """

    log_terms: bool = True
    _pending: _PendingLosses | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._logged: set[str] = set()
        self._told = False  # whether it was warned of terms beside a loss

    @pl.LightningModule.trainer.setter  # type: ignore[attr-defined,untyped-decorator]
    def trainer(self, trainer: pl.Trainer | None) -> None:
        """The trainer that the module is attached to."""
        pl.LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if trainer is not None:
            lightning_internals.set_result_reader(trainer, partial(self._read_training_step, trainer))
            Guard.watch(trainer)
            _ = self.balancer  # before the optimizers are made of the parameters

    def backward_terms(self, losses: Losses, optimizer: Optimizer, *, balanced: bool = True) -> Tensor | None:
        """In manual optimization: one backward pass per term, for this optimizer's parameters only.

        Call ``optimizer.step()`` afterwards. With another optimizer than MTAdam the balancer balances the losses; if
        there is none, it is one backward pass on the plain sum.

        Args:
            losses: named scalar losses.
            optimizer: one of ``self.optimizers()``.
            balanced: whether the balancer is for these losses; it is for one optimizer's only.

        Returns:
            The value that the gradient belongs to, for closures to return; ``None`` if it belongs to none, as MTAdam's.

        Example:
            In ``training_step``, with ``self.automatic_optimization = False``::

                generator, discriminator = self.optimizers()
                generator.zero_grad()
                self.backward_terms({"l1": l1, "gan": gan}, generator)
                generator.step()
        """
        optimizer = lightning_internals.unwrap(optimizer)
        balancer = mtadam_of(optimizer) or (self.balancer if balanced else None)
        losses = self._checked(losses, optimizer, balancer)
        total, result = _sum(losses), ClosureResult(None)
        result.loss = total.detach() if balancer is None else None
        self._pending = _PendingLosses(losses, total, 1, optimizer, balancer, result)
        self._log_losses(losses, total if len(self.trainer.optimizers) == 1 else None, "training_step")
        try:
            self.manual_backward(total)
        finally:
            self._pending = None
        return result.loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate the terms of the pending losses; a loss of its own as in every LightningModule."""
        pending, self._pending = self._pending, None
        if pending is None:
            return super().backward(loss, *args, **kwargs)
        if pending.balancer is None:
            self._backward_once(pending, loss, *args, **kwargs)
            return
        pending.balancer.name_parameters(self.named_parameters())
        balance: Callable[..., Tensor | None] = pending.balancer.backward
        if pending.balancer is not pending.optimizer:
            run = partial(self._backward_once, pending, *args, **kwargs)
            balance = partial(balance, optimizer=pending.optimizer, run=run)
        # What Lightning made of the sum, it has made of every term: a factor for accumulation and loss scaling.
        (factor,) = torch.autograd.grad(loss, pending.total)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        objective = balance(
            pending.losses,
            model=self.trainer.strategy.model,
            grad_output=factor,
            loss_scale=factor * pending.accumulated if scaled else None,
        )
        if objective is not None:
            pending.result.loss = objective

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pending": None}

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the balanced gradient of MTAdam; the gradients of other optimizers as in every LightningModule."""
        mtadam = mtadam_of(lightning_internals.unwrap(optimizer))
        if mtadam is None:
            return super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        limit = self.trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        algorithm = self.trainer.gradient_clip_algorithm if gradient_clip_algorithm is None else gradient_clip_algorithm
        if limit:
            mtadam.clip_gradients(limit, str(getattr(algorithm, "value", algorithm) or "norm"))  # type: ignore[arg-type]

    def _backward_once(self, pending: _PendingLosses, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """An ordinary backward pass; in manual optimization for the parameters of one optimizer."""
        if self.automatic_optimization:
            super().backward(loss, *args, **kwargs)
        elif self.trainer.world_size == 1:
            super().backward(loss, *args, inputs=_trainable(pending.optimizer), **kwargs)
        else:  # the hooks that average want a pass through everything
            with self._keeping_gradients_of_others(pending.optimizer):
                super().backward(loss, *args, **kwargs)

    @contextmanager
    def _keeping_gradients_of_others(self, optimizer: Optimizer) -> Iterator[None]:
        own = {id(parameter) for parameter in _trainable(optimizer)}
        others = [parameter for parameter in self.parameters() if id(parameter) not in own]
        before = [parameter.grad for parameter in others]
        for parameter in others:
            parameter.grad = None
        yield
        for parameter, gradient in zip(others, before, strict=True):
            parameter.grad = gradient

    def _read_training_step(self, trainer: pl.Trainer, output: Any, accumulated: int) -> ClosureResult:
        """Make of a training step's output what the automatic loop goes on with, and keep its losses for backward."""
        self._pending = None
        if trainer.lightning_module is not self:  # it trains another module now, which may hold this one
            return ClosureResult.from_training_step_output(output, accumulated)
        optimizer = self.trainer.optimizers[0]
        output = dict(output.items()) if isinstance(output, Mapping) else output
        named = isinstance(output, Mapping) and "loss" not in output
        balancer = self.balancer
        if not named and output is not None and balancer is not None:
            raise TypeError(
                f"{type(balancer).__name__} balances named losses, but training_step returned"
                f" {'one loss' if isinstance(output, Mapping) else 'a ' + type(output).__name__}. Return a dict of"
                " named scalar losses, or no balancer from configure_balancer."
            )
        mtadam = mtadam_of(optimizer)
        if not named and (output is None or mtadam is None):
            return ClosureResult.from_training_step_output(output, accumulated)
        if not named and isinstance(output, Mapping):
            self._tell_of_terms_beside(output)
        losses = output if named else {"loss": output["loss"] if isinstance(output, Mapping) else output}
        losses = self._checked(losses, optimizer, mtadam or balancer)
        if accumulated > 1 and balancer is not None and isinstance(optimizer, LBFGS):
            raise ValueError(_ACCUMULATED_LBFGS)
        total = _sum(losses) if named else losses["loss"]
        if named:
            output = {**{name: loss.detach() for name, loss in losses.items()}, "loss": total}
        result = ClosureResult.from_training_step_output(output, accumulated)
        if not lightning_internals.skips_backward(self.trainer):
            self._pending = _PendingLosses(losses, total, accumulated, optimizer, mtadam or balancer, result)
        elif mtadam is not None:
            mtadam.skip_step()
        if named:
            result.extra["loss"] = result.loss  # for callbacks: the sum, whatever value the optimizer gets
            self._log_losses(losses, total, "on_before_backward")
        return result

    def _tell_of_terms_beside(self, output: Mapping[str, Any]) -> None:
        """Warn, once, if MTAdam is given one loss while what look like its terms lie beside it."""
        terms = [
            name
            for name, value in output.items()
            if name != "loss" and isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad
        ]
        if terms and not self._told:
            self._told = True
            warn(
                f"training_step returned {tuple(output)}: of these Lightning trains 'loss' alone, as one term, so that"
                f" MTAdam has nothing to balance. Return the terms by their names and leave out their sum, e.g."
                f" {{{', '.join(f'{name!r}: {name}' for name in terms)}}}; or detach what is only to be looked at."
            )

    def _checked(self, losses: Losses, optimizer: Optimizer, balancer: MTAdam | Balancer | None) -> Losses:
        losses, alone = as_losses(losses, optimizer), self.trainer.world_size == 1
        check_losses(losses, None if balancer is None else balancer.terms or None, finite=False, graph=alone)
        reduced = isinstance(balancer, Balancer | None) and (balancer is None or balancer.one_backward)
        if not alone and reduced and not any(loss.requires_grad for loss in losses.values()):
            check_losses(losses, finite=False)  # MTAdam's ranks agree on terms without a graph, DDP's reducer does not
        return losses

    def _log_losses(self, losses: Losses, total: Tensor | None, hook: str) -> None:
        if not self.log_terms or self.trainer.barebones:
            return
        values = {f"train/{name}": loss.detach() for name, loss in losses.items()}
        if total is not None and "loss" not in losses:
            values["train/loss"] = total.detach()
        with lightning_internals.logging_as(self, hook):
            for name, value in values.items():
                # In manual optimization the user may have logged the same name in the same hook: that one counts.
                if name in self._logged or not lightning_internals.has_logged(self.trainer, hook, name):
                    self._logged.add(name)
                    self.log(name, value, prog_bar=name == "train/loss", batch_size=1)


def _sum(losses: Losses) -> Tensor:
    """The sum of those that have a graph; the others are zero. It has one also where none has, as on one process."""
    total = torch.stack([*filter(HAS_GRAPH, losses.values())] or list(losses.values())).sum()
    return total if total.requires_grad else total.requires_grad_()


def _trainable(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
