"""Finds a module's outputs in the graph of the losses.

A forward hook puts a node into the graph that knows the output. Nothing else holds it: outputs that no loss derives
from are forgotten with their graph, and those of an earlier step cannot be taken for this one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_mtadam.balancers.batch import Batch, wide
from lightning_mtadam.balancers.names import module_of
from lightning_mtadam.terms import Losses


class _Mark(torch.autograd.Function):
    """The identity; its node has the attribute ``marked``: the module's name and its output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, name: str) -> Tensor:
        ctx.marked = name, output
        return output.detach()  # an alias that is no view: it may still be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def mark_outputs(model: nn.Module, name: str, option: str = "output") -> None:
    """From now on mark the outputs of the module of this name, which was given as this option.

    Raises:
        ValueError: there is no such module, with near matches.
    """
    module = module_of(model, name, option)
    module.register_forward_hook(partial(_mark, name, option))


def _mark(name: str, option: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor | None:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{option}={name!r} must name a module whose output is one tensor, but {type(module).__name__} returns a"
            f" {type(output).__name__}. Name the layer within it that makes the tensor, or an nn.Identity() that you"
            " pass it through."
        )
    if not output.requires_grad or _name_of(output.grad_fn) == name:  # copies of a module have copies of its hooks
        return None
    marked: Tensor = _Mark.apply(output, name)
    return marked


def find_outputs(losses: Losses, name: str, trained: Iterable[Tensor]) -> list[Tensor]:
    """The marked outputs that the losses derive from.

    Args:
        losses: named losses; those without a graph are passed over.
        name: of the module.
        trained: the parameters whose gradients are wanted.

    Raises:
        ValueError: a loss that does not derive from an output of the module, or that reaches a trained parameter on
            another way as well; an output that goes into another one.
    """
    own = {id(parameter) for parameter in trained if parameter.requires_grad}
    found: dict[Node, Tensor] = {}
    for term, loss in losses.items():
        if not loss.requires_grad:
            continue
        marks, leaves = _ends(loss, name)
        if any(id(leaf) in own for leaf in leaves):
            raise ValueError(_around(term, name, [leaf for leaf in leaves if id(leaf) in own]))
        if not marks:
            raise ValueError(
                f"losses[{term!r}] does not derive from the output of {name!r}, so it cannot be balanced there. Name"
                " the module that all terms pass through, or leave the term out. The output must not be detached, nor"
                " the module part of a compiled one; without Lightning, call balancer.attach(model) before the"
                " forward pass."
            )
        found |= marks
    return list(found.values())


def outputs_of(loss: Tensor, name: str) -> list[Tensor]:
    """The marked outputs of the module of this name that a loss derives from; none if it passes none."""
    return list(_ends(loss, name)[0].values()) if loss.requires_grad else []


def gradients_at(outputs: Sequence[Tensor], loss: Tensor, batch: Batch) -> list[Tensor]:
    """The gradient of a term at each output, without the loss scale and the share of the batch; the graph is kept."""
    if not loss.requires_grad:  # a constant on this process
        return [torch.zeros_like(output, dtype=wide(output.dtype)) for output in outputs]
    # By one, if no small gradient can vanish: a fused loss holds its gradient, and multiplies it in place in each pass.
    scale = None if batch.loss_scale is None else batch.factor.to(loss, copy=True)
    found = torch.autograd.grad(loss, outputs, scale, retain_graph=True, materialize_grads=True)
    wides = [gradient.detach().to(wide(gradient.dtype)) for gradient in found]  # torch 2.6: zeros have a graph
    return wides if scale is None else [gradient / batch.factor for gradient in wides]


def sample_norms(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the L2 norms of the samples, which the first dimension counts; a scalar is one sample."""
    samples = [found.flatten(1) if found.dim() > 1 else found.reshape(-1, 1) for found in gradients]
    return torch.stack([torch.linalg.vector_norm(rows, dim=1).sum() for rows in samples]).sum()


def refuse_nested(outputs: Sequence[Tensor], name: str) -> None:
    """Raise if an output derives from another one: its gradient would be counted there, too.

    It walks through the whole network.
    """
    same = {id(output) for output in outputs}
    for output in outputs:
        marks, _ = _ends(output, name)
        if any(id(earlier) in same for earlier in marks.values()):
            raise ValueError(
                f"An output of {name!r} goes into {name!r} again, and terms derive from both, so gradients at the"
                " outputs are not those of single calls. Name a module that is passed once, or .detach() the output"
                " before it goes in again."
            )


def _ends(start: Tensor, name: str) -> tuple[dict[Node, Tensor], list[Tensor]]:
    """Where the ways from a tensor down its graph end: at marked outputs, and at leaves."""
    marks: dict[Node, Tensor] = {}
    leaves: list[Tensor] = []
    seen, waiting = set[Node](), [start.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _name_of(node) == name:
            marks[node] = node.marked[1]  # type: ignore[attr-defined]
        elif hasattr(node, "variable"):  # where the gradient of a leaf is accumulated
            leaves.append(node.variable)
        else:
            waiting += [following for following, _ in node.next_functions]
    return marks, leaves


def _name_of(node: Node | None) -> str | None:
    """The name of the module whose output a node marks, if it marks one."""
    marked: tuple[str, Tensor] | None = getattr(node, "marked", None)
    return None if marked is None else marked[0]


def _around(term: str, name: str, leaves: Sequence[Tensor]) -> str:
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves[:3])
    return (
        f"losses[{term!r}] reaches trained parameters (of the shapes {shapes}) without passing the output of {name!r}:"
        " that gradient would be lost. Name a later module, give the optimizer only what lies before the output, or"
        " leave the term out."
    )
