"""Collects the gradient of each loss term, one backward pass per term."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_mtadam.distributed.sharding import local_gradient
from lightning_mtadam.terms import Losses


def term_gradients(
    losses: Losses, parameters: Sequence[Tensor], *, grad_output: Tensor | None = None
) -> Generator[tuple[str, list[Tensor | None]], None, None]:
    """Differentiate each loss by itself, in order; the graph is freed with the last one.

    Nothing is written to ``.grad``, so hooks that fire there (a distributed reducer's, for example) stay asleep.

    Args:
        losses: named scalar losses; they may share a graph.
        parameters: the tensors to differentiate with respect to; those without ``requires_grad`` get ``None``.
        grad_output: scalar by which every loss is multiplied (accumulation, loss scaling); ``None`` means 1.

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
    trainable = _trainable(parameters)
    inputs = [parameters[index] for index in trainable]
    last = _last_with_graph(losses)
    for name, loss in losses.items():
        gradients: list[Tensor | None] = [None] * len(parameters)
        if loss.requires_grad:
            found = torch.autograd.grad(
                loss,
                inputs,
                grad_outputs=None if grad_output is None else grad_output.to(loss),
                retain_graph=name != last,
                allow_unused=True,
            )
            for index, gradient in zip(trainable, found, strict=True):
                gradients[index] = gradient
            del found, gradient
        _refuse_sparse(name, gradients)
        yield name, gradients
        del gradients  # the next term's need the place


def sharded_term_gradients(
    losses: Losses, parameters: Sequence[Tensor], model: nn.Module, *, grad_output: Tensor | None = None
) -> Generator[tuple[str, list[Tensor | None]], None, None]:
    """As ``term_gradients``, for parameters that ``fully_shard`` has cut: this process's parts of the gradients.

    Args:
        losses: named scalar losses; they may share a graph.
        parameters: sharded.
        model: the network: the gradients of its other parameters are kept as they are.
        grad_output: scalar by which every loss is multiplied; ``None`` means 1.

    Yields:
        The term's name and the parts of its gradients, averaged over the processes.
    """
    from lightning_mtadam.distributed.fsdp import ShardedNetwork  # not imported above: it takes a second

    trainable = _trainable(parameters)
    last = _last_with_graph(losses)
    network = ShardedNetwork(model, parameters)
    try:
        for name, loss in losses.items():
            network.differentiate(loss, grad_output, last=name == last)
            gradients: list[Tensor | None] = [None] * len(parameters)
            for index in trainable:
                gradients[index] = local_gradient(parameters[index])
            yield name, gradients
            del gradients
    finally:
        network.restore()


def _trainable(parameters: Sequence[Tensor]) -> list[int]:
    trainable = [index for index, parameter in enumerate(parameters) if parameter.requires_grad]
    if not trainable:
        raise ValueError("No parameter of the optimizer requires a gradient, so there is nothing to train.")
    return trainable


def _last_with_graph(losses: Losses) -> str | None:
    """After which term the graph can be freed."""
    return next((name for name in reversed(list(losses)) if losses[name].requires_grad), None)


def _refuse_sparse(name: str, gradients: Sequence[Tensor | None]) -> None:
    if any(gradient is not None and gradient.layout != torch.strided for gradient in gradients):
        raise TypeError(
            f"losses[{name!r}] has a sparse gradient, which is not supported. Use e.g. nn.Embedding(sparse=False)."
        )


def refuse_reentrant_checkpoints(losses: Losses) -> None:
    """Raise if a loss passes through reentrant activation checkpointing.

    Its part of the graph is built during ``backward()`` only: per-term gradients would silently stop there.

    Raises:
        ValueError: naming the loss.
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
