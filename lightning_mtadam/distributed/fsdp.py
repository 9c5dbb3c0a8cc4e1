"""A network that ``fully_shard`` has cut, during several backward passes over one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_mtadam.distributed.sharding import average, is_sharded


class ShardedNetwork:
    """The network while its terms are differentiated one after another.

    ``fully_shard`` gathers parameters and scatters gradients in hooks that ``backward()`` wakes, and leaves the
    gradient, averaged over the processes, in ``.grad``. What was there before comes back in the end.

    A module that is whole after the forward pass (the root as a rule, or with ``reshard_after_forward=False``) stays
    so until the last term: a loss that was computed from its parameters outside of it wakes no hook, and would read
    memory that the term before has freed.

    Args:
        model: the network.
        parameters: those of its parameters that are trained.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_requires_gradient_sync(True, recurse=False)  # else all terms would be added up in one place
        whole = {module: own for module in modules if not all(map(is_sharded, own := list(_own(module))))}
        for module in whole:
            module.reshard()  # for a moment: only now does it have its sharded parameters
        self._everything = list({id(p): p for p in (*parameters, *model.parameters())}.values())
        self._before = [parameter.grad for parameter in self._everything]
        cut = {module: list(_own(module)) for module in whole}
        self._pairs = [
            (part, parameter)
            for module in whole
            for part, parameter in zip(cut[module], whole[module], strict=True)
            if is_sharded(part)
        ]
        trained = {id(parameter) for parameter in parameters}
        self._kept = [module for module in whole if any(id(part) in trained for part in cut[module])]
        for module in whole:
            module.unshard()
        for module in self._kept:
            module.set_reshard_after_backward(False, recurse=False)

    def differentiate(self, loss: Tensor, grad_output: Tensor | None, *, last: bool, retain_graph: bool) -> None:
        """Leave the gradients of one term in ``.grad``.

        Args:
            loss: a scalar.
            grad_output: multiplies it.
            last: whether no term is to come.
            retain_graph: whether the graph is kept.
        """
        for parameter in self._everything:
            parameter.grad = None
        if last:
            self._let_reshard()
        factor = None if grad_output is None else grad_output.to(loss, copy=True)  # a backward may write to it
        torch.autograd.backward(loss, factor, retain_graph=retain_graph)
        for part, parameter in self._pairs:
            if parameter.grad is not None:  # of a loss that woke no hook
                gradient = average(parameter.grad.to(part.dtype), part)
                part.grad = gradient if part.grad is None else part.grad + gradient
                parameter.grad = None

    def restore(self) -> None:
        """Bring back the gradients that were there before, and shard what the last term did not."""
        self._let_reshard()
        for module in self._kept:
            module.reshard()
        for parameter, gradient in zip(self._everything, self._before, strict=True):
            parameter.grad = gradient

    def _let_reshard(self) -> None:
        for module in self._kept:
            module.set_reshard_after_backward(True, recurse=False)


@contextmanager
def left_whole(model: nn.Module) -> Iterator[None]:
    """Let the modules that are whole after a forward pass be so again, for the backward pass that is still to come."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    whole = [module for module in modules if not all(map(is_sharded, _own(module)))]
    try:
        yield
    finally:
        for module in whole:
            module.unshard()


def _own(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of a module but for those of modules in it that are wrapped themselves."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own(child)
