"""Joins the rows of a table that is too long to be read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def few_rows(table: Tensor, rows: Sequence[str], at_most: int = 40) -> tuple[Tensor, list[str], str]:
    """Join the rows of a long table, so that it can be read: by the modules that their names tell, else by neighbors.

    Args:
        table: the values, [R, C]; nan where there is none.
        rows: R names, with dots between modules, as parameters have.
        at_most: how many rows are wanted.

    Returns:
        The medians over the rows that are joined, [at most so many, C]; names for them; and a sentence that says so,
        empty where nothing was joined.

    Example:
        >>> names = ["encoder.0.weight", "encoder.0.bias", "head.weight"]
        >>> few_rows(torch.tensor([[1.0], [3.0], [2.0]]), names, at_most=2)[1]
        ['encoder.0', 'head.weight']
    """
    if len(rows) <= at_most:
        return table, list(rows), ""
    deepest = max(name.count(".") for name in rows)
    for depth in range(deepest, 0, -1):
        names = [".".join(name.split(".")[:depth]) for name in rows]
        counts = Counter(names)
        if len(counts) <= at_most:
            names = [whole if counts[name] == 1 else name for whole, name in zip(rows, names, strict=True)]
            return *_joined(table, names), f"Each row is the median of the layers of a module, of {len(rows)} in all."
    length = math.ceil(len(rows) / at_most)
    firsts, lasts = rows[::length], [*rows[length - 1 :: length], rows[-1]]
    names = [f"{firsts[i // length]} to {lasts[i // length]}" for i in range(len(rows))]
    return *_joined(table, names), f"Each row is the median of {length} neighboring layers, of {len(rows)} in all."


def _joined(table: Tensor, names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """The medians of the rows of one name, and the names."""
    places: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        places.setdefault(name, []).append(index)
    return torch.stack([table[found].nanmedian(0).values for found in places.values()]), list(places)
