"""What balancers have in common that need the gradient of every term."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mtadam.balancers.balancer import Balancer, Batch
from lightning_mtadam.distributed.averaging import averaging_of
from lightning_mtadam.distributed.processes import Processes
from lightning_mtadam.gradients import refuse_reentrant_checkpoints, term_gradients
from lightning_mtadam.lightning_internals import as_fabric_backward
from lightning_mtadam.optim.finite import is_host, non_finite
from lightning_mtadam.optim.layers import PLACEHOLDER, clean_names
from lightning_mtadam.optim.layout import Block, TermMemory, fitting
from lightning_mtadam.optim.norms import norm_table
from lightning_mtadam.optim.pending import PendingGradients
from lightning_mtadam.optim.state import balance_dtype
from lightning_mtadam.optim.uninterrupted import uninterrupted
from lightning_mtadam.terms import Losses


@dataclass(frozen=True)
class StepGradients:
    """The gradients of a step so far, averaged over the processes where they average.

    ``P`` parameters of the optimizer, ``I`` terms.

    Attributes:
        memory: holds the gradients: the rows are those of the terms, zero where there is no gradient.
        norms: [P, I], in fp32 or better.
        present: per term, whether it is in this step's losses.
        reached: per parameter, whether any term reaches it.
        layers: the names of the parameters.
    """

    memory: TermMemory
    norms: Tensor
    present: list[bool]
    reached: list[bool]
    layers: tuple[str, ...]

    @property
    def finite(self) -> Tensor:
        """Whether all gradients are finite, a boolean scalar."""
        return self.norms.isfinite().all()

    def flags(self, values: list[bool]) -> Tensor:
        """The same as a tensor beside the norms."""
        return torch.tensor(values, device=self.norms.device)

    def weighted_sum(self, weights: Tensor) -> list[Tensor | None]:
        """The sum of the terms' gradients, each times its weight at the layer: [P, I], in fp32 or better -> P."""
        summed: list[Tensor | None] = [None] * len(self.layers)
        for span in self.memory.spans:
            for place, member in enumerate(span.members):
                block = Block(span, place, place + 1, span.bounds[place], span.bounds[place + 1])
                gradients = self.memory.columns(block)  # [I, elements]
                factors = weights[member].to(gradients.device)
                total = factors @ gradients.to(factors.dtype)
                summed[member] = total.to(gradients.dtype).view_as(self.memory.parameters[member])
        return summed


class GradientBalancer(Balancer):
    """Differentiates every loss by itself, and makes one gradient of the terms' gradients.

    Nothing passes through the network's wrappers but the forward pass: the terms' gradients are averaged over the
    processes here, each while the next one is computed.

    Args:
        terms: the names of the losses, if known ahead.
    """

    one_backward: ClassVar[bool] = False

    def __init__(self, terms: Iterable[str] | None = None) -> None:
        super().__init__(terms)
        self._pending = PendingGradients()
        self._others: list[Tensor | None] = []  # what was in .grad when the step began

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pending": PendingGradients(), "_others": []}

    @abstractmethod
    def _combine(self, step: StepGradients, terms: tuple[str, ...]) -> list[Tensor | None]:
        """The gradient to step on, one per parameter, and ``_state`` from ``_before``.

        Of gradients that are not finite, which a gradient scaler or an accelerator lets through, something that is not
        finite is made, and ``_state`` is ``_before``.
        """

    def _check(self, losses: Losses, model: nn.Module, optimizer: Optimizer, processes: Processes) -> None:
        super()._check(losses, model, optimizer, processes)
        if not self._state:  # a walk over the whole graph: before the first step only
            refuse_reentrant_checkpoints(losses)

    def _pending_terms(self) -> tuple[str, ...]:
        return tuple(self._pending.gradients)

    @uninterrupted()
    def _balance(self, batch: Batch, terms: tuple[str, ...]) -> None:
        if batch.begins:
            self._others = [parameter.grad for parameter in batch.parameters]
        try:
            combined = self._balanced(batch, terms)
        except BaseException:
            self._pending.clear()
            self._state = self._before
            for parameter, other in zip(batch.parameters, self._others, strict=True):
                parameter.grad = other
            raise
        for parameter, gradient, other in zip(batch.parameters, combined, self._others, strict=True):
            parameter.grad = other if gradient is None else gradient if other is None else other + gradient

    def _balanced(self, batch: Batch, terms: tuple[str, ...]) -> list[Tensor | None]:
        """The gradient to step on, times the loss scale, one per parameter; ``None`` where no term reaches it."""
        self._collect(batch, terms)
        step = self._observe(batch, terms)
        if batch.loss_scale is None and is_host(step.norms.device) and not bool(step.finite):
            raise non_finite(step.norms, step.layers, terms)
        with torch.autocast(step.norms.device.type, enabled=False):  # manual optimization runs under it
            combined = self._combine(step, terms)
        reached = [None if not flag else gradient for gradient, flag in zip(combined, step.reached, strict=True)]
        if batch.loss_scale is None:
            return reached
        return [None if gradient is None else gradient * batch.loss_scale.to(gradient) for gradient in reached]

    def _collect(self, batch: Batch, terms: tuple[str, ...]) -> None:
        """Add the gradients of this batch to those of the step."""
        pending, parameters = self._pending, batch.parameters
        if batch.begins:
            pending.drop_gradients()
        trained = [parameter.requires_grad for parameter in parameters]
        pending.use(fitting(pending.memory, parameters, trained, [0] * len(parameters), len(terms)), terms)
        with as_fabric_backward():
            pending.collect(
                term_gradients(batch.losses, parameters, grad_output=batch.grad_output),
                tuple(batch.losses),
                terms,
                parameters,
                batch.loss_scale,
                averaging_of(batch.processes),
                may_miss=batch.processes.group is not None,
            )

    def _observe(self, batch: Batch, terms: tuple[str, ...]) -> StepGradients:
        """What has been collected in this step."""
        pending, parameters = self._pending, batch.parameters
        assert pending.memory is not None
        names = {id(parameter): name for name, parameter in batch.model.named_parameters()}
        labels = [names.get(id(parameter), f"{PLACEHOLDER}{index}") for index, parameter in enumerate(parameters)]
        norms = norm_table(
            [pending.gradients.get(term, [None] * len(parameters)) for term in terms],
            [pending.norms.get(term) for term in terms],
            balance_dtype(parameters),
            parameters[0].device,
            uniform=False,
        )
        present = [term in pending.gradients for term in terms]
        return StepGradients(pending.memory, norms, present, pending.touched, tuple(clean_names(labels)))
