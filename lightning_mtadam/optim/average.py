"""The scales, averaged over the steps so far: what ``export_weights`` reads.

The average is geometric, as scales are ratios, and a factor on a loss then divides the average exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def record(averages: Tensor, counts: Tensor, scales: Tensor, finite: Tensor | None) -> None:
    """Average the logarithm of the scales, in place, over the steps in which they are above zero.

    A running mean, since a sum in fp32 would lose the digits of what is added to it in a long run; and a mean of equal
    numbers stays that number to the last digit.

    Args:
        averages: [P, I], the mean logarithm so far.
        counts: [P, I], over how many steps it is taken.
        scales: [P, I] or broadcastable, of this step, >= 0.
        finite: a boolean scalar; where it is false nothing may change. ``None``: it is known to be true.

    Example:
        >>> averages, counts = torch.zeros(1, 2), torch.zeros(1, 2)
        >>> record(averages, counts, torch.tensor([[1.0, 0.0]]), None)
        >>> record(averages, counts, torch.tensor([[100.0, 3.0]]), None)
        >>> averages.exp(), counts
        (tensor([[10.,  3.]]), tensor([[2., 1.]]))
    """
    counted = scales > 0
    if finite is not None:
        counted = counted & finite
    counts.add_(counted)
    averages.lerp_(torch.special.xlogy(counted, scales), counted / counts.clamp(min=1))


def average_by_layer(averages: Tensor, counts: Tensor, layer_of: Tensor, layers: int) -> Tensor:
    """The geometric mean of each layer's scales; nan where none was above zero.

    All parameters of a layer have the same entries, but for those that were trained from a later step on.

    Args:
        averages: [P, I], as of ``record``.
        counts: [P, I], likewise.
        layer_of: [P], the layer of each parameter, in 0..layers-1.
        layers: L.

    Returns:
        [L, I].
    """
    empty = averages.new_zeros(layers, averages.shape[1])
    steps = empty.index_add(0, layer_of, counts)
    logs = empty.index_add(0, layer_of, averages * counts) / steps
    return torch.where(steps > 0, logs.exp(), math.nan)
