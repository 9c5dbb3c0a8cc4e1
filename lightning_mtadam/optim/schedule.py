"""Which steps measure the balance, where it is not measured at every step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, reduce

import torch
from torch import Tensor

from lightning_mtadam.terms import Losses

SUM = "sum of the terms"  # what messages call the only loss of a light step
AVERAGED = 20  # measurements so many steps apart are averaged with beta3 itself; closer ones count less


@lru_cache(maxsize=64)
def next_measurement(step: int, every: int) -> int:
    """The first step, from ``step`` on, at which the balance is measured. Steps are counted from 0.

    The gaps grow up to ``every``: in the beginning the balance moves fast.

    Example:
        >>> [step for step in range(50) if next_measurement(step, every=10) == step]
        [0, 1, 2, 3, 4, 6, 8, 11, 14, 18, 23, 29, 37, 47]
    """
    measured = 0
    while measured < step:
        gap = min(every, 1 + measured // 4)
        if gap == every:
            return measured + -(-(step - measured) // every) * every
        measured += gap
    return measured


def is_measured(step: int, every: int) -> bool:
    """Whether the balance is measured in this step."""
    return every == 1 or next_measurement(step, every) == step


def decay_of_norms(beta3: float, every: int) -> float:
    """The decay of the gradient norms' average for each measurement."""
    return beta3 if every == 1 else float(beta3 ** min(1, every / AVERAGED))


def weighted_sum(losses: Losses, factors: Mapping[str, Tensor]) -> Losses:
    """The one loss of a light step: the sum of the losses, each multiplied by its factor."""
    with torch.enable_grad():
        parts = [loss * factors[name].to(loss.device) for name, loss in losses.items()]
        dtype = reduce(torch.promote_types, [part.dtype for part in parts])
        return {SUM: torch.stack([part.to(parts[0].device, dtype) for part in parts]).sum()}
