"""Where the ticks of an axis and the names beside a chart go: numbers, without any drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence


def factor(value: float) -> str:
    """A factor, as an axis says it.

    Example:
        >>> [factor(value) for value in (0.001, 0.5, 1.0, 100.0, 1e-7, 1e9)]
        ['0.001x', '0.5x', '1x', '100x', '1e-7x', '1e9x']
    """
    plain = f"{value:.0e}" if value < 5e-4 or value >= 1e4 else f"{value:g}"
    return plain.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e") + "x"


def factor_ticks(low: float, high: float) -> list[float]:
    """Round factors between two powers of ten, at most ten; the whole powers alone where there are some of them.

    Example:
        >>> factor_ticks(-3.2, 0.3), factor_ticks(-0.4, 0.5)
        ([0.001, 0.01, 0.1, 1.0], [0.5, 1.0, 2.0])
    """
    if high - low > 2:
        powers = range(math.ceil(low), math.floor(high) + 1)
        every = math.ceil(len(powers) / 9)
        return [10.0**power for power in powers if power % every == 0]
    between = [(power, digit) for power in range(math.floor(low), math.floor(high) + 1) for digit in (1, 2, 5)]
    return [digit * 10.0**power for power, digit in between if low <= power + math.log10(digit) <= high]


def step_ticks(first: float, last: float) -> list[int]:
    """Round steps from the first to the last, some four to six.

    Example:
        >>> step_ticks(9, 939)
        [200, 400, 600, 800]
    """
    rough = max(last - first, 1) / 6
    size = 10 ** math.floor(math.log10(rough))
    width = max(next(digit * size for digit in (1, 2, 5, 10) if digit * size >= rough), 1)
    return [int(tick * width) for tick in range(math.ceil(first / width), math.floor(last / width) + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places that are ``gap`` apart at least and as near as can be to those that are wanted, between two ends.

    In the order of ``wanted``. The sum of the squares of the moves is the smallest; pool adjacent violators finds it.

    Example:
        >>> spread([10.0, 50.0, 11.0], gap=4.0, low=0.0, high=60.0)
        [8.5, 50.0, 12.5]
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    blocks: list[tuple[float, int]] = []  # of the places less the gaps below them: the mean, and of how many
    for rank, index in enumerate(order):
        mean, count = wanted[index] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    last = max(low, high - (len(wanted) - 1) * gap)
    places = [min(max(place, low), last) + rank * gap for rank, place in enumerate(flat)]
    return [place for _, place in sorted(zip(order, places, strict=True))]
