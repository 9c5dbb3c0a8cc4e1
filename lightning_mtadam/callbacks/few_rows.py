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
    modules = modules_of(rows, at_most)
    counts = Counter(modules)
    if len(counts) <= at_most:
        names = [whole if counts[name] == 1 else name for whole, name in zip(rows, modules, strict=True)]
        return *_joined(table, names), f"Each row is the median of the layers of a module, of {len(rows)} in all."
    length = math.ceil(len(rows) / at_most)
    firsts, lasts = rows[::length], [*rows[length - 1 :: length], rows[-1]]
    names = [f"{firsts[i // length]} to {lasts[i // length]}" for i in range(len(rows))]
    return *_joined(table, names), f"Each row is the median of {length} neighboring layers, of {len(rows)} in all."


def modules_of(rows: Sequence[str], at_most: int) -> list[str]:
    """For each row the module that it is joined to, so that there are at most so many, as deep as there is room.

    The outermost ones, if these are too many still.

    Example:
        >>> modules_of(["encoder.0", "encoder.1", "head"], at_most=2)
        ['encoder', 'encoder', 'head']
    """
    names, depth = list(rows), max(name.count(".") for name in rows)
    while len(set(names)) > at_most and depth > 0:
        names = [".".join(name.split(".")[:depth]) for name in rows]
        depth -= 1
    return names


def _joined(table: Tensor, names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """The medians of the rows of one name, and the names."""
    places: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        places.setdefault(name, []).append(index)
    return torch.stack([table[found].nanmedian(0).values for found in places.values()]), list(places)
