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
from torch.optim import Optimizer

from lightning_mtadam import lightning_internals
from lightning_mtadam.balancer_slot import BalancerSlot, mtadam_of
from lightning_mtadam.balancers import Balancer
from lightning_mtadam.collect import as_losses
from lightning_mtadam.distributed.averaging import means_over_ranks
from lightning_mtadam.distributed.uninterrupted import uninterrupted
from lightning_mtadam.guard import Guard, check_output, refuse_accumulated_lbfgs, tell_of_terms_beside
from lightning_mtadam.optim import MTAdam
from lightning_mtadam.progress_bar import bar_names
from lightning_mtadam.terms import HAS_GRAPH, Losses, check_losses

TOTAL = "train/loss"
"""The tag of the sum of the terms."""


@dataclass(frozen=True)
class _PendingLosses:
    """The losses of a training step between the forward and the backward pass.

    Attributes:
        losses: the terms, with their graphs.
        total: their sum; what Lightning scales and passes to ``backward`` derives from it.
        accumulated: by how many batches Lightning divides.
        optimizer: whose gradients are wanted.
        balancer: makes one gradient of them: MTAdam, or a balancer; ``None`` if their sum is wanted.
        shown: what is logged once all processes have agreed on the losses.
        result: whose ``loss`` the closure returns to the optimizer.
    """

    losses: Losses
    total: Tensor
    accumulated: int
    optimizer: Optimizer
    balancer: MTAdam | Balancer | None
    shown: Losses
    result: ClosureResult


class MultiTermLightningModule(BalancerSlot, pl.LightningModule):
    """A LightningModule for training on several losses.

    ``training_step`` returns a dict of named scalar losses. With :class:`~lightning_mtadam.optim.MTAdam` as optimizer,
    one backward pass per term is run and the step is balanced; with any other optimizer the module trains on the plain
    sum of the terms. A tensor, or a dict with the key "loss", is treated as in every LightningModule. Accumulation,
    gradient clipping, schedulers and callbacks work as ever; clipping acts on the balanced gradient.

    The terms are logged as ``train/<term>``, their sum as ``train/loss``, and their means over the batches of an epoch
    as ``train/<term>_epoch`` and ``train/loss_epoch``; in a run of one epoch loggers get the last of these alone. With
    several processes all of these are means over them, and the same on each. What you log under one of these names
    yourself stands in its place.

    The progress bar shows the first six terms, by short names: "kl" for "kl_loss". It shows their sum, "loss", only if
    the module trains on that: without MTAdam and without a balancer. With these the sum says little: it follows the
    term with the largest numbers, and may rise while all goes well. ``train/loss`` is logged in any case, for callbacks
    that monitor it. On an accelerator, whose numbers the host would wait for, the bar is renewed every
    ``log_every_n_steps``.

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
    _log_beside: lightning_internals.LogBeside | None = None

    @property
    def pending(self) -> _PendingLosses | None:
        """The losses that are about to be differentiated, with their optimizer and balancer; ``None`` if none are."""
        return self._pending

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told = False  # whether it was warned of terms beside a loss

    @pl.LightningModule.trainer.setter  # type: ignore[attr-defined,untyped-decorator]
    def trainer(self, trainer: pl.Trainer | None) -> None:
        """The trainer that the module is attached to."""
        pl.LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if trainer is not None:
            lightning_internals.set_result_reader(trainer, partial(self._read_training_step, trainer))
            self._log_beside = lightning_internals.LogBeside(trainer, TOTAL)
            Guard.watch(trainer)
            _ = self.balancer  # before the optimizers are made of the parameters

    def backward_terms(
        self, losses: Losses, optimizer: Optimizer, *, balanced: bool = True, retain_graph: bool = False
    ) -> Tensor | None:
        """In manual optimization: one backward pass per term, for this optimizer's parameters only.

        Call ``optimizer.step()`` afterwards. With another optimizer than MTAdam the balancer balances the losses; if
        there is none, it is one backward pass on the plain sum.

        Args:
            losses: named scalar losses. ``ValueError`` or ``TypeError`` tells of those that cannot be balanced.
            optimizer: one of ``self.optimizers()``.
            balanced: whether the balancer is for these losses; it is for one optimizer's only.
            retain_graph: whether to keep the graph, for another optimizer that trains on it.

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
        self._told = self._told or tell_of_terms_beside(losses, named=True)
        total, result = _sum(losses), ClosureResult(None)
        result.loss = total.detach() if balancer is None else None
        shown = self._shown(losses, total if len(self.trainer.optimizers) == 1 else None)
        self._keep(_PendingLosses(losses, total, 1, optimizer, balancer, shown, result))
        try:
            self.manual_backward(total, retain_graph=retain_graph)
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
        if isinstance(pending.balancer, Balancer):
            balance = partial(balance, optimizer=pending.optimizer, run=partial(self._backward_once, pending))
        # What Lightning made of the sum, it has made of every term: a factor for accumulation and loss scaling.
        (factor,) = torch.autograd.grad(loss, pending.total)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        balance = partial(
            balance,
            pending.losses,
            model=self.trainer.strategy.model,
            grad_output=factor,
            loss_scale=factor * pending.accumulated if scaled else None,
            **kwargs,
        )
        if self.trainer.world_size == 1:
            objective = balance()
        else:
            with uninterrupted():  # who leaves between the two would leave the others waiting
                objective = balance()
                self._log(pending.shown, pending.balancer, agreed=True)
        if objective is not None:
            pending.result.loss = objective

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pending": None, "_log_beside": None}

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the balanced gradient of MTAdam; the gradients of other optimizers as in every LightningModule."""
        limit = self.trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        if limit is None and gradient_clip_algorithm is None:
            return
        mtadam = mtadam_of(lightning_internals.unwrap(optimizer))
        if mtadam is None:
            return super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
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
            _refuse_static_graph(self.trainer)
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
        if output is None:
            return ClosureResult.from_training_step_output(None, accumulated)
        optimizer = self.trainer.optimizers[0]
        output = dict(output.items()) if isinstance(output, Mapping) else output
        mtadam = mtadam_of(optimizer)
        balancer = mtadam or self.balancer
        named = isinstance(output, Mapping) and "loss" not in output
        if not named:
            check_output(output, balancer)
        if not named and balancer is None:
            return ClosureResult.from_training_step_output(output, accumulated)
        if not named and isinstance(output, Mapping):
            self._told = self._told or tell_of_terms_beside(output, named=False)
        losses = output if named else {"loss": output["loss"] if isinstance(output, Mapping) else output}
        losses = self._checked(losses, optimizer, balancer)
        if accumulated > 1 and isinstance(balancer, Balancer):
            refuse_accumulated_lbfgs(optimizer)
        total = _sum(losses) if named else losses["loss"]
        shown = self._shown(losses, total) if named else {}
        if named:
            output = {**{name: loss.detach() for name, loss in losses.items()}, "loss": total}
        result = ClosureResult.from_training_step_output(output, accumulated)
        if not lightning_internals.skips_backward(self.trainer):
            self._keep(_PendingLosses(losses, total, accumulated, optimizer, balancer, shown, result))
        else:
            self._log(shown, balancer)
            if mtadam is not None:
                mtadam.skip_step()
        if named:
            result.extra["loss"] = result.loss  # for callbacks: the sum, whatever value the optimizer gets
        return result

    def _keep(self, pending: _PendingLosses) -> None:
        """Keep losses for backward, and log them, unless other processes must have agreed on them before."""
        self._pending = pending
        if pending.balancer is None or self.trainer.world_size == 1:
            self._log(pending.shown, pending.balancer)

    def _checked(self, losses: Losses, optimizer: Optimizer, balancer: MTAdam | Balancer | None) -> Losses:
        losses, alone = as_losses(losses, optimizer), self.trainer.world_size == 1
        check_losses(losses, None if balancer is None else balancer.terms or None, finite=False, graph=alone)
        reduced = isinstance(balancer, Balancer | None) and (balancer is None or balancer.one_backward)
        if not alone and reduced and not any(loss.requires_grad for loss in losses.values()):
            check_losses(losses, finite=False)  # MTAdam's ranks agree on terms without a graph, DDP's reducer does not
        return losses

    def _shown(self, losses: Losses, total: Tensor | None) -> Losses:
        """What there is to log, by its tags."""
        if not self.log_terms or self.trainer.barebones:
            return {}
        shown = {f"train/{name}": loss.detach() for name, loss in losses.items()}
        return shown if total is None or TOTAL in shown else {**shown, TOTAL: total.detach()}

    def _log(self, shown: Losses, balancer: MTAdam | Balancer | None, *, agreed: bool = False) -> None:
        """Log it, averaged over the processes; ``agreed``: whether these are known to have the same terms."""
        if not shown or self._log_beside is None:
            return
        if self.trainer.world_size > 1:
            names, numbers = means_over_ranks(shown, self.device, agreed=agreed)
        else:
            names, numbers = tuple(shown), torch.stack(list(shown.values()))
        self._log_beside.add(names, numbers, on_bar=bar_names(names, TOTAL, summed=balancer is None))


def _sum(losses: Losses) -> Tensor:
    """The sum of those that have a graph; the others are zero. It has one also where none has, as on one process."""
    found = [*filter(HAS_GRAPH, losses.values())] or list(losses.values())
    total = (torch.stack(found) * 1).sum()  # each its own gradient, to which its backward may write
    return total if total.requires_grad else total.requires_grad_()


def _refuse_static_graph(trainer: pl.Trainer) -> None:
    """Raise if the reducer would take the backward pass of another optimizer for that of this one."""
    if len(trainer.optimizers) > 1 and getattr(trainer.strategy.model, "static_graph", False):
        raise ValueError(
            "DistributedDataParallel(static_graph=True) knows the backward pass of one optimizer, but there are"
            f" {len(trainer.optimizers)}: the gradients of the others would not be averaged. Leave static_graph out."
        )


def _trainable(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
