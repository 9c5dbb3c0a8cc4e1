"""The gradient of each loss term, one backward pass per term   (Alg. 1, line 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import Node

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
) -> Found:
    """Differentiate each loss by itself, in order; the graph is freed with the last one.

    Nothing is written to ``.grad``, so hooks that fire there (a distributed reducer's, for example) stay asleep.

    Args:
        losses: named scalar losses; they may share a graph.
        parameters: the tensors to differentiate with respect to; those without ``requires_grad`` get ``None``.
        grad_output: scalar by which every loss is multiplied (accumulation, loss scaling); ``None`` means 1.
        network: the network whose parameters ``fully_shard`` has cut: gradients are then this process's parts,
            averaged over the processes.

    Yields:
        The term's name and its gradients, one per parameter, ``None`` where the term does not reach it. The tensors
        may share memory with each other: do not write to them. A loss without a graph reaches nothing.

    Raises:
        ValueError: no parameter requires a gradient.
        TypeError: a gradient is sparse.

    Example:
        >>> w, b = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        >>> dict(term_gradients({"fit": w * b, "decay": w**2}, [w, b]))
        {'fit': [tensor(1.), tensor(2.)], 'decay': [tensor(4.), None]}
    """
    trainable = [index for index, parameter in enumerate(parameters) if parameter.requires_grad]
    if not trainable:
        raise ValueError("No parameter of the optimizer requires a gradient, so there is nothing to train.")
    inputs = [parameters[index] for index in trainable]
    last = ([None, *[name for name, loss in losses.items() if loss.requires_grad]])[-1]
    try:
        for name, loss in losses.items():
            found: Sequence[Tensor | None] = [None] * len(inputs)
            if network is not None:
                network.differentiate(loss, grad_output, last=name == last)
                found = [local_gradient(parameter) for parameter in inputs]
            elif loss.requires_grad:
                factor = None if grad_output is None else grad_output.to(loss)
                found = torch.autograd.grad(loss, inputs, factor, retain_graph=name != last, allow_unused=True)
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


def refuse_reentrant_checkpoints(losses: Losses) -> None:
    """Raise ``ValueError`` if a loss passes through reentrant activation checkpointing.

    Its part of the graph is built during ``backward()`` only: per-term gradients would silently stop there.
    """
    seen = set[Node]()
    for name, loss in losses.items():
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() == "CheckpointFunctionBackward":
                raise ValueError(
                    f"losses[{name!r}] passes through reentrant activation checkpointing, where the gradients of single"
                    " terms cannot be taken. Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
                )
            waiting += [following for following, _ in node.next_functions]
