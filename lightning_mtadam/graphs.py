"""What can be seen in the graphs of losses, when a term comes for the first time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from lightning_mtadam.terms import Losses, is_host, warn

LOOKS = 10  # steps from one look at the factors of losses to the next
CHANGES = 10  # of a factor, all in one direction, that are told of


def look_at(losses: Losses, seen: set[str]) -> list[str]:
    """Raise for a graph that hides a part from the gradients of single terms.

    Gives the losses through whose graphs :func:`tell_of_added_gradients` should look. ``seen`` are the terms that were
    looked at before; the names of these are added.

    Raises:
        ValueError: a loss passes through reentrant activation checkpointing. Its part of the graph is built during
            ``backward()`` only: the gradients of single terms would stop there.
    """
    new = {name: loss for name, loss in losses.items() if name not in seen}
    custom = [name for name, loss in new.items() if _has_custom_function(name, loss.grad_fn)]
    seen.update(new)
    return custom if len(losses) > 1 else []


def tell_of_added_gradients(losses: Losses, parameters: Sequence[Tensor], name: str) -> None:
    """Warn if a graph adds a gradient that is no term's: it is there for losses that are multiplied by zero, too.

    It is the last backward pass of these graphs: fused losses may hold gradients that every pass multiplies in place.
    """
    found = [loss for loss in losses.values() if loss.requires_grad]
    inputs, zeros = [one for one in parameters if one.requires_grad], [torch.zeros_like(loss) for loss in found]
    gradients = torch.autograd.grad(found, inputs, zeros, allow_unused=True)
    if any(one is not None and bool((one.abs() > 0).any()) for one in gradients):  # not nan, which may be 0 times inf
        warn(
            f"The backward pass of losses[{name!r}] adds a gradient that does not come from the loss, such as that of"
            " an auxiliary loss: it is there even if the loss is multiplied by zero. As there is a backward pass for"
            " each term, it counts once per term. Return what it comes from as a term."
        )


def tell_of_ramps(losses: Losses, runs: dict[str, list[float]]) -> None:
    """Warn of a loss that is multiplied by a number which rises, or falls, from look to look: MTAdam balances it away.

    Only the last operation is looked at. ``runs`` are the numbers seen since each turned last, by term, and kept.
    """
    for name, loss in losses.items():
        run, factor = runs.setdefault(name, []), _factor_of(loss.grad_fn)
        if len(run) > CHANGES or (run and factor == run[-1]):
            continue
        if factor is None:
            run.clear()
            continue
        if len(run) > 1 and (factor > run[-1]) != (run[-1] > run[-2]):
            del run[:-1]
        run.append(factor)
        if len(run) > CHANGES:
            warn(
                f"losses[{name!r}] is multiplied by a number that changes from step to step, from {run[0]:.3g} to"
                f" {run[-1]:.3g} so far. MTAdam balances factors of losses away: this is no schedule of the term's"
                " influence, which is full from the first step on, and more while the number rises. Leave the number"
                f" out, and call optimizer.set_importance({{{name!r}: number}}) instead, or give the trainer"
                " lightning_mtadam.callbacks.ImportanceScheduler."
            )


def _factor_of(node: Node | None) -> float | None:
    """The number by which a graph's last operation multiplies, if it does, and the host knows it."""
    if node is None or node.name() != "MulBackward0":
        return None
    one, other = (following for following, _ in node.next_functions)
    kept = "other" if other is None else "self" if one is None else None
    value = getattr(
        getattr(node, f"_raw_saved_{kept}", None), "data", None
    )  # to unpack it could run a checkpointed part of the network again
    if isinstance(value, Tensor) and value.dim() == 0 and is_host(value.device):
        return float(value)
    return None


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
