"""What balancers have in common that need the gradient of every term."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_mtadam.balancers.balancer import Balancer
from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.balancing import norm_table, norms_of, wide_dtype
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.collect.pending import PendingGradients
from lightning_mtadam.constants import constant
from lightning_mtadam.distributed.uninterrupted import uninterrupted
from lightning_mtadam.edits.shown import run_hooks
from lightning_mtadam.graphs import look_at, tell_of_added_gradients
from lightning_mtadam.lightning_internals import as_fabric_backward
from lightning_mtadam.terms import PLACEHOLDER, TermGradients, clean_names, is_host, non_finite


@dataclass(frozen=True)
class StepGradients:
    """The gradients of a step so far: the terms' own, over all of its batches, and averaged over the processes.

    ``P`` parameters of the optimizer, ``I`` terms, ``n`` entries of all parameters that are trained.

    Attributes:
        memory: where the gradients are; :meth:`weighted_sum`, :meth:`matrix` and :meth:`split` read it.
        norms: [P, I], the L2 norm of each term's gradient at each parameter, in fp32 or better; zero without one.
        present: [I], whether the term is in this step's losses.
        reached: [P], whether any term reaches the parameter.
        layers: [P], the parameters' names.

    Example:
        >>> class Look(GradientBalancer):
        ...     def combine(self, step):
        ...         print(step.layers, step.norms, step.matrix())
        ...         return step.weighted_sum(torch.ones_like(step.norms))
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> model, optimizer = torch.nn.ParameterList([w]), torch.optim.SGD([w])
        >>> Look().backward({"fit": w[0], "decay": w.square().sum()}, optimizer, model=model)
        ('0',) tensor([[ 1., 10.]]) tensor([[1., 0.],
                [6., 8.]])
        >>> w.grad
        tensor([7., 8.])
    """

    memory: GradientMemory
    norms: Tensor
    present: list[bool]
    reached: list[bool]
    layers: tuple[str, ...]

    @property
    def finite(self) -> Tensor:
        """Whether all gradients are finite: a boolean scalar, which the host need not read."""
        return self.norms.isfinite().all()

    def flags(self, values: list[bool]) -> Tensor:
        """The ``values`` as a tensor beside the norms, e.g. ``step.flags(step.present)``, [I]."""
        return constant(values, torch.bool, self.norms.device)

    def weighted_sum(self, weights: Tensor) -> list[Tensor | None]:
        """The sum of the terms' gradients, each multiplied by its weight at each parameter.

        Args:
            weights: [P, I], in fp32 or better.

        Returns:
            One gradient for each of the P parameters; ``None`` for those that are not trained.
        """
        summed: list[Tensor | None] = [None] * len(self.layers)
        for index, pack in enumerate(self.memory.packs):
            places, columns = self.memory.places[index], self.memory.columns(index)
            pieces = torch.split(columns, [place.room for place in places], 1)
            for member, place, gradients in zip(pack, places, pieces, strict=True):
                factors = weights[member].to(gradients.device)
                total = factors @ gradients.to(factors.dtype)
                summed[member] = place.view(total.to(gradients.dtype), 0)
        return summed

    def matrix(self) -> Tensor:
        """The gradients of the terms that are present as rows, in fp32 or better: [present terms, n]."""
        places = constant([at for at, flag in enumerate(self.present) if flag], torch.int64, self.norms.device)
        return torch.cat([rows.to(self.norms) for rows in self.memory.rows], 1)[places]

    def split(self, vector: Tensor) -> list[Tensor | None]:
        """The parts of a ``vector`` [n], in the order of :meth:`matrix`, as P gradients; ``None`` where not trained."""
        parts = torch.split(vector, [rows.shape[1] for rows in self.memory.rows])
        return self.memory.shaped([part.to(rows) for part, rows in zip(parts, self.memory.rows, strict=True)])


class GradientBalancer(Balancer):
    """Differentiates every loss by itself, and makes one gradient of the terms' gradients.

    Nothing passes through the network's wrappers but the forward pass: the terms' gradients are averaged over the
    processes here, each while the next one is computed.

    A balancer of your own that needs the terms' gradients is a subclass with a method :meth:`combine`.

    Args:
        terms: the names of the losses, if known ahead.

    Example:
        >>> class Larger(GradientBalancer):  # at each parameter, the gradient of the term that pulls hardest there
        ...     def combine(self, step):
        ...         return step.weighted_sum((step.norms == step.norms.amax(1, keepdim=True)).to(step.norms))
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> model, optimizer = torch.nn.ParameterList([w]), torch.optim.SGD([w])
        >>> Larger().backward({"fit": w[0], "decay": w.square().sum()}, optimizer, model=model)
        >>> w.grad
        tensor([6., 8.])
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
        """Make the gradient to step on, and set ``state`` from ``state_before``.

        It is called after every batch, with the gradients of all batches of the step so far. Of gradients that are not
        finite, which a gradient scaler or an accelerator lets through, make something that is not finite, and leave
        ``state`` as ``state_before`` is.

        Args:
            step: the gradients of the terms.

        Returns:
            One gradient for each parameter of the optimizer; those of parameters that no term reaches are not used.
        """

    def pending_terms(self) -> tuple[str, ...]:
        """As of every balancer."""
        return tuple(self._pending.gradients)

    def held_gradients(self) -> TermGradients:
        """The gradients of the terms in all batches of the step so far, by term, [P] each: not to be written to."""
        return dict(self._pending.gradients)

    @uninterrupted()
    def balance(self, batch: Batch) -> None:
        """Differentiate the terms, and leave what ``combine`` makes of them in ``p.grad``."""
        before = self.state_before  # the gradients of earlier batches are dropped, too
        if batch.begins:
            self._others, before = [parameter.grad for parameter in batch.parameters], self.state
        try:
            combined = self._combined(batch)
        except BaseException:
            self._pending.clear()
            self.state = before
            for parameter, other in zip(batch.parameters, self._others, strict=True):
                parameter.grad = other
            raise
        for parameter, gradient, other in zip(batch.parameters, combined, self._others, strict=True):
            parameter.grad = other if gradient is None else gradient if other is None else other + gradient
        run_hooks(batch.parameters)

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
            custom = [] if batch.retain_graph else look_at(batch.losses, pending.seen)
            pending.add(replace(batch, retain_graph=True) if custom else batch, batch.terms)
            if custom:
                tell_of_added_gradients(batch.losses, parameters, custom[0])
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
