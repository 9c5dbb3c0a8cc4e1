"""What balancers have in common that need the gradient of every term."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mtadam.balancers.balancer import Balancer
from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.collect.norms import is_host, norm_table, norms_of, wide_dtype
from lightning_mtadam.collect.pending import PendingGradients
from lightning_mtadam.distributed.uninterrupted import uninterrupted
from lightning_mtadam.lightning_internals import as_fabric_backward
from lightning_mtadam.terms import PLACEHOLDER, clean_names, non_finite, refuse_reentrant_checkpoints


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

    memory: GradientMemory
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
        for place, pack in enumerate(self.memory.packs):
            sizes = [self.memory.shapes[member].numel() for member in pack]
            for member, gradients in zip(pack, torch.split(self.memory.columns(place), sizes, 1), strict=True):
                factors = weights[member].to(gradients.device)
                total = factors @ gradients.to(factors.dtype)
                summed[member] = total.to(gradients.dtype).view(self.memory.shapes[member])
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
    def combine(self, step: StepGradients) -> list[Tensor | None]:
        """The gradient to step on, one per parameter, and ``state`` from ``state_before``.

        Of gradients that are not finite, which a gradient scaler or an accelerator lets through, something that is not
        finite is made, and ``state`` is ``state_before``.
        """

    def check(self, batch: Batch, optimizer: Optimizer) -> None:
        """As of every balancer."""
        super().check(batch, optimizer)
        if not self.state:  # a walk over the whole graph: before the first step only
            refuse_reentrant_checkpoints(batch.losses)

    def pending_terms(self) -> tuple[str, ...]:
        """As of every balancer."""
        return tuple(self._pending.gradients)

    @uninterrupted()
    def balance(self, batch: Batch) -> None:
        """Differentiate the terms, and leave what ``combine`` makes of them in ``p.grad``."""
        if batch.begins:
            self._others = [parameter.grad for parameter in batch.parameters]
        try:
            combined = self._combined(batch)
        except BaseException:
            self._pending.clear()
            self.state = self.state_before
            for parameter, other in zip(batch.parameters, self._others, strict=True):
                parameter.grad = other
            raise
        for parameter, gradient, other in zip(batch.parameters, combined, self._others, strict=True):
            parameter.grad = other if gradient is None else gradient if other is None else other + gradient

    def _combined(self, batch: Batch) -> list[Tensor | None]:
        """The gradient to step on, times the loss scale, one per parameter; ``None`` where no term reaches it."""
        pending, parameters = self._pending, batch.parameters
        if batch.begins:
            pending.drop_gradients()
        trained = [parameter.requires_grad for parameter in parameters]
        keys = [0] * len(parameters)
        memory = GradientMemory.fitting(pending.memory, parameters, trained, keys, len(batch.terms))
        pending.use(memory, batch.terms)
        with as_fabric_backward():
            pending.add(batch, batch.terms)
        step = self._observe(batch, memory)
        if batch.loss_scale is None and is_host(step.norms.device) and not bool(step.finite):
            raise non_finite(step.norms, step.layers, batch.terms)
        with torch.autocast(step.norms.device.type, enabled=False):  # manual optimization runs under it
            combined = self.combine(step)
        reached = [None if not flag else gradient for gradient, flag in zip(combined, step.reached, strict=True)]
        if batch.loss_scale is None:
            return reached
        return [None if gradient is None else gradient * batch.loss_scale.to(gradient) for gradient in reached]

    def _observe(self, batch: Batch, memory: GradientMemory) -> StepGradients:
        """What has been collected in this step."""
        pending, parameters = self._pending, batch.parameters
        names = {id(parameter): name for name, parameter in batch.network.named_parameters()}
        labels = [names.get(id(parameter), f"{PLACEHOLDER}{index}") for index, parameter in enumerate(parameters)]
        none: list[Tensor | None] = [None] * len(parameters)
        norms = [pending.norms.get(term) or norms_of(pending.gradients.get(term, none)) for term in batch.terms]
        table = norm_table(norms, torch.empty(0, dtype=wide_dtype(parameters), device=parameters[0].device))
        present = [term in pending.gradients for term in batch.terms]
        return StepGradients(memory, table, present, pending.touched, tuple(clean_names(labels)))
