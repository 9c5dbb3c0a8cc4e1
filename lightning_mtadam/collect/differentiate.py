"""The gradient of each loss term, one backward pass per term   (Alg. 1, line 5)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_mtadam.distributed.sharding import local_gradient
from lightning_mtadam.terms import Found, Losses

if TYPE_CHECKING:
    from lightning_mtadam.distributed.fsdp import ShardedNetwork


def term_gradients(
    losses: Losses,
    parameters: Sequence[Tensor],
    *,
    grad_output: Tensor | None = None,
    network: ShardedNetwork | None = None,
    retain_graph: bool = False,
) -> Found:
    """Differentiate each loss by itself, in order; ``.grad`` is not touched.

    Args:
        losses: named scalar losses; they may share a graph. One without a graph reaches nothing.
        parameters: the tensors to differentiate with respect to; those without ``requires_grad`` get ``None``.
        grad_output: scalar by which every loss is multiplied (accumulation, loss scaling); ``None`` means 1.
        network: around parameters that ``fully_shard`` has cut: gradients are this process's parts, averaged.
        retain_graph: whether the graph is kept; else it is freed with the last term.

    Yields:
        The term's name and its gradients, one per parameter, ``None`` where the term does not reach it. The tensors
        may share memory with each other: do not write to them.

    Example:
        >>> w, b = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        >>> dict(term_gradients({"fit": w * b, "decay": w**2}, [w, b]))
        {'fit': [tensor(1.), tensor(2.)], 'decay': [tensor(4.), None]}
    """
    trainable = [index for index, parameter in enumerate(parameters) if parameter.requires_grad]
    if not trainable:
        raise ValueError("No parameter of the optimizer requires a gradient, so there is nothing to train.")
    inputs = [parameters[index] for index in trainable]
    before = list(map(attrgetter("grad"), inputs))
    for parameter in inputs:
        parameter.grad = None  # what a backward pass in a backward pass leaves there is the term's
    last = ([None, *[name for name, loss in losses.items() if loss.requires_grad]])[-1]
    try:
        for name, loss in losses.items():
            found: Sequence[Tensor | None] = [None] * len(inputs)
            if network is not None:
                network.differentiate(loss, grad_output, last=name == last, retain_graph=retain_graph or name != last)
                found = [local_gradient(parameter) for parameter in inputs]
            elif loss.requires_grad:
                factor = None if grad_output is None else grad_output.to(loss, copy=True)  # a backward may write to it
                found = torch.autograd.grad(loss, inputs, factor, retain_graph or name != last, allow_unused=True)
                if not all(map(is_, map(attrgetter("grad"), inputs), repeat(None))):
                    found = [_with_inner(*pair) for pair in zip(found, inputs, strict=True)]
            gradients: list[Tensor | None] = [None] * len(parameters)
            for index, gradient in zip(trainable, found, strict=True):
                if gradient is not None and gradient.layout != torch.strided:
                    raise TypeError(
                        f"losses[{name!r}] has a sparse gradient, which is not supported. Use e.g."
                        " nn.Embedding(sparse=False)."
                    )
                gradients[index] = gradient
            del found, gradient
            yield name, gradients
            del gradients  # the next term's need the place
    finally:
        if network is not None:
            network.restore()
        for parameter, gradient in zip(inputs, before, strict=True):
            parameter.grad = gradient


def _with_inner(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient, and what the backward pass of a function within, as of offloaded checkpoints, left in ``.grad``."""
    inner, parameter.grad = parameter.grad, None
    return gradient if inner is None else inner if gradient is None else gradient + inner
