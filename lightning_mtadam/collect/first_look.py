"""What is looked at when a term comes for the first time: whether its graph can be differentiated term by term."""

from __future__ import annotations

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from lightning_mtadam.collect.batch import Batch
from lightning_mtadam.terms import Losses, warn


def look_at(batch: Batch, seen: set[str]) -> None:
    """Raise for a graph that hides a part from the gradients of single terms; warn if it adds what is no term's.

    ``seen``: the terms that were looked at before; these losses' names are added.

    Raises:
        ValueError: a loss passes through reentrant activation checkpointing. Its part of the graph is built during
            ``backward()`` only: the gradients of single terms would stop there.
    """
    new = {name: loss for name, loss in batch.losses.items() if name not in seen}
    custom = [name for name, loss in new.items() if _has_custom_function(name, loss.grad_fn)]
    seen.update(new)
    if custom and len(batch.losses) > 1 and not batch.processes.sharded and _adds_gradients(batch):
        warn(
            f"The backward pass of losses[{custom[0]!r}] adds a gradient that does not come from the loss, such as that"
            " of an auxiliary loss: it is there even if the loss is multiplied by zero. As there is a backward pass for"
            " each term, it counts once per term. Return what it comes from as a term."
        )


def _has_custom_function(name: str, root: Node | None) -> bool:
    """Whether the user's own ``torch.autograd.Function`` is in a graph."""
    found, seen, waiting = False, set[Node](), [root]
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
        if isinstance(node, BackwardCFunction):
            found |= not getattr(node, "_forward_cls", Node).__module__.startswith("torch.")
        waiting += [following for following, _ in node.next_functions]
    return found


def _adds_gradients(batch: Batch) -> bool:
    """Whether there is a gradient of losses that are multiplied by zero."""
    losses = [loss for loss in batch.losses.values() if loss.requires_grad]
    inputs, zeros = [one for one in batch.parameters if one.requires_grad], [torch.zeros_like(loss) for loss in losses]
    found = torch.autograd.grad(losses, inputs, zeros, retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool((gradient.abs() > 0).any()) for gradient in found)  # nan may be 0 times inf
