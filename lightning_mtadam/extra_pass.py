"""The gradients of single losses, taken beside a backward pass that trains, which does not notice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_mtadam.collect import Batch, hand_on
from lightning_mtadam.distributed.agreement import count_terms
from lightning_mtadam.distributed.averaging import mean_over
from lightning_mtadam.distributed.processes import ALONE, Processes, has_static_graph, processes_of
from lightning_mtadam.graphs import look_at
from lightning_mtadam.terms import Gradients, TermGradients, check_losses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class ExtraPass:
    """The gradients of the losses of a step, which may have several batches.

    One backward pass per loss is run on a graph that is kept. ``p.grad``, running statistics, random numbers and the
    network's wrappers are as without it, and hooks of parameters are not called. It holds one gradient per term.

    Attributes:
        gradients: of each loss one per parameter, over all batches so far; of this process.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> losses, beside = {"fit": w[0] * 1, "decay": w.square().sum()}, ExtraPass()
        >>> beside.add(Batch(losses, [w]))
        >>> sum(losses.values()).backward()
        >>> beside.averaged()
        {'fit': [tensor([1., 0.])], 'decay': [tensor([6., 8.])]}
    """

    gradients: TermGradients = field(default_factory=dict)
    _parameters: Sequence[Tensor] = ()
    _processes: Processes = ALONE

    def add(self, batch: Batch) -> None:
        """Differentiate the losses of one batch, and add their gradients to those of earlier ones.

        Args:
            batch: its ``losses``, ``parameters``, ``model``, ``grad_output`` and ``loss_scale`` are looked at.

        Raises:
            ValueError: a loss that is no scalar, or has no graph and is not zero; a wrapper of the network, or a part
                of the graph, with which the gradients of single losses cannot be taken.
            TypeError: a loss that is no real floating-point tensor.
        """
        check_losses(batch.losses, finite=False, graph=False)
        _refuse_static_graph(batch)
        look_at(batch.losses, set())
        processes = processes_of(batch.model, batch.parameters)
        hand_on(replace(batch, processes=processes, retain_graph=True), self._take)
        self._parameters, self._processes = batch.parameters, processes

    def averaged(self) -> TermGradients:
        """The gradients, averaged over the processes that train together; of sharded parameters they are already.

        It is a collective. A term that this process does not have counts as zero here.
        """
        group = self._processes.group
        if group is None or self._processes.sharded:
            return self.gradients
        names = count_terms(tuple(self.gradients), group)  # in the same order everywhere
        found = {name: self._mean(self.gradients.get(name) or [None] * len(self._parameters), group) for name in names}
        return {name: found[name] for name in sorted(found, key=[*self.gradients, *found].index)}

    def _mean(self, gradients: Gradients, group: ProcessGroup) -> list[Tensor | None]:
        """The mean over the processes of the gradient of each parameter that is trained; one collective per kind."""
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                kinds.setdefault((parameter.device, parameter.dtype), []).append(index)
        found: list[Tensor | None] = [None] * len(gradients)
        for indices in kinds.values():
            places = [self._parameters[index] for index in indices]
            mine = [gradients[index] for index in indices]
            whole = [torch.zeros_like(at) if one is None else one for at, one in zip(places, mine, strict=True)]
            mean = mean_over(torch.cat([one.reshape(-1) for one in whole]), group)
            parts = torch.split(mean, [at.numel() for at in places])
            for index, part, at in zip(indices, parts, places, strict=True):
                found[index] = part.view(at.shape)
        return found

    def _take(self, batch: Batch) -> None:
        with _without_a_trace(batch), closing(batch.gradients()) as found:
            for name, gradients in found:
                new = divided(gradients, batch.loss_scale)
                old = self.gradients.get(name)
                self.gradients[name] = new if old is None else list(map(_sum, old, new))


@contextmanager
def _without_a_trace(batch: Batch) -> Iterator[None]:
    """Backward passes within leave random numbers, the hooks of parameters and a sharded network as they were."""
    with ExitStack() as stack:
        devices = {parameter.device for parameter in batch.parameters if parameter.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(sorted(devices, key=str)))
        stack.enter_context(_silent_hooks(batch.parameters))
        if batch.processes.sharded and batch.model is not None:
            from lightning_mtadam.distributed.fsdp import left_whole  # not imported above: it takes a second

            stack.enter_context(left_whole(batch.model))
        yield


@contextmanager
def _silent_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let no hook of ``p.register_hook`` be called: it may count, or remember what it sees."""
    held = [(hooks, dict(hooks)) for one in parameters if (hooks := one._backward_hooks)]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


def _refuse_static_graph(batch: Batch) -> None:
    if has_static_graph(batch.model):
        raise ValueError(
            "DistributedDataParallel(static_graph=True) would take the gradients of single losses for its first"
            " backward pass, and average nothing then. Leave static_graph out, or the callback that asks for them."
        )


def divided(gradients: Gradients, scale: Tensor | None) -> list[Tensor | None]:
    """The gradients without the loss scale, if there is one."""
    return [one if one is None or scale is None else one / scale.to(one) for one in gradients]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
