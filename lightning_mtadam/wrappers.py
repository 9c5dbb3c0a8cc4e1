"""Optimizers around optimizers, as Lookahead, SAM and Accelerate's are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch.optim import Optimizer


def wrapped_in(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that are attributes of an optimizer: what it wraps, if anything."""
    return [held for held in vars(optimizer).values() if isinstance(held, Optimizer) and held is not optimizer]


def within(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizer, and those that it wraps.

    Example:
        >>> class Wrapper(Optimizer):
        ...     def __init__(self, wrapped):
        ...         self.wrapped, self.param_groups = wrapped, wrapped.param_groups
        >>> sgd = torch.optim.SGD([torch.ones(1)])
        >>> [type(one).__name__ for one in within(Wrapper(Wrapper(sgd)))]
        ['Wrapper', 'Wrapper', 'SGD']
    """
    yield optimizer
    for held in wrapped_in(optimizer):
        yield from within(held)


def nothing_to_consume(optimizer: Optimizer) -> RuntimeError:
    """The error of a ``step()`` before which no terms were differentiated."""
    return RuntimeError(
        "step() has nothing to consume: it takes the gradients of terms, not p.grad. Call, in place of loss.backward(),"
        " optimizer.backward({'name': loss}) before. In Lightning return {'name': loss} from a"
        " MultiTermLightningModule, or call its backward_terms({'name': loss}, optimizer) manually."
        f"{who_steps(optimizer)}"
    )


def who_steps(optimizer: Optimizer) -> str:
    """What to call instead, where a wrapper or a gradient scaler has called ``step()`` in vain; else empty."""
    found: dict[str, None] = {}  # in order
    frame = inspect.currentframe()
    while frame is not None:
        holder = frame.f_locals.get("self")
        if isinstance(holder, torch.amp.GradScaler):
            found[
                " A GradScaler steps it: with scale = scaler.scale(torch.ones(())) call"
                " optimizer.backward({'name': loss, ...}, grad_output=scale, loss_scale=scale) in place of"
                " scaler.scale(loss).backward()."
            ] = None
        elif isinstance(holder, Optimizer) and not isinstance(holder, type(optimizer)):  # as Lightning's wrappers are
            for name in [name for name, held in vars(holder).items() if held is optimizer]:
                found[
                    f" It is wrapped: {type(holder).__name__} holds this {type(optimizer).__name__} as .{name}. Call"
                    f" backward on that, wrapper.{name}.backward({{'name': loss, ...}}), and then wrapper.step()."
                ] = None
        frame = frame.f_back
    return "".join(found)
