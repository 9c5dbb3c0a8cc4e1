"""Which steps measure the balance, where it is not measured at every step: each term in its own time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

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


def due_terms(names: Iterable[str], group: Mapping[str, Any], every: int) -> list[str]:
    """Those of the terms of a step's losses that are to be measured in it.

    In the steps in which the balance is measured, all; else those that never were, or not for ``every`` steps.
    """
    step, measured = group["steps"], dict(group["measured"])
    if is_measured(step, every):
        return list(names)
    return [name for name in names if step - measured.get(name, -every) >= every]


def hangs_on(names: Iterable[str], group: Mapping[str, Any], every: int) -> bool:
    """Whether a step is measured only if those of these terms are there that are due."""
    return every > 1 and not is_measured(group["steps"], every) and bool(due_terms(names, group, every))


def await_terms(names: Iterable[str], group: Mapping[str, Any], every: int) -> dict[str, int]:
    """Until which step those that came too late to be measured are waited for: as long as they were not, or longer."""
    step, measured = group["steps"], dict(group["measured"])
    return {name: step + max(every, step - measured.get(name, 0)) for name in names}


def decay_of_norms(beta3: float, every: int) -> float:
    """The decay of the gradient norms' average for each measurement."""
    return beta3 if every == 1 else float(beta3 ** min(1, every / AVERAGED))
