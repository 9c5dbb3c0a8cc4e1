"""Losses that cost next to nothing beside the step: what remains is the optimizer's own work."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_mtadam import MTAdam


class _Linear(torch.autograd.Function):
    """A loss of given gradients, in two kernels for each."""

    @staticmethod
    def forward(ctx: object, factor: float, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)  # type: ignore[attr-defined]
        ctx.factor = factor  # type: ignore[attr-defined]
        return parameters[0].new_ones(())

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        return (None, *[grad * parameter * ctx.factor for parameter in saved])  # type: ignore[attr-defined]


def losses_of(parameters: Iterable[Tensor], terms: int) -> dict[str, Tensor]:
    """Terms whose gradients are multiples of the parameters."""
    mine = list(parameters)
    return {f"term{index}": _Linear.apply(index + 1.0, *mine) for index in range(terms)}


def step(optimizer: MTAdam, losses: dict[str, Tensor]) -> None:
    """All of a step but the forward pass."""
    optimizer.zero_grad()
    optimizer.backward(losses)
    optimizer.step()
