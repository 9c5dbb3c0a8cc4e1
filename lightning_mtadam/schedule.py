"""Which steps measure the balance, where it is not measured at every step: each term in its own time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

AVERAGED = 20  # measurements so many steps apart are averaged with beta3 itself; closer ones count less


def is_due(step: int, every: int, measured: tuple[int, int] | None) -> bool:
    """Whether a term that is in this step's losses is to be measured. Steps are counted from 0.

    ``measured``: the first and the last step in which it was; ``None``: in none. The gaps grow up to ``every``: in the
    beginning the balance moves fast.

    Example:
        >>> steps = [0]
        >>> for step in range(50):
        ...     if is_due(step, 10, (0, steps[-1])):
        ...         steps.append(step)
        >>> steps
        [0, 1, 2, 3, 4, 6, 8, 11, 14, 18, 23, 29, 37, 47]
    """
    if measured is None:
        return True
    first, last = measured
    return step >= last + min(every, 1 + (last - first) // 4)


def due_terms(names: Iterable[str], group: Mapping[str, Any], every: int) -> list[str]:
    """Those of the terms of a step's losses that are to be measured in it."""
    measured = {term: (first, last) for term, first, last in group["measured"]}
    return [name for name in names if is_due(group["steps"], every, measured.get(name))]


def await_terms(names: Iterable[str], group: Mapping[str, Any], every: int) -> dict[str, int]:
    """Until which step those that came too late to be measured are waited for: as long as they were not, or longer."""
    step, lasts = group["steps"], {term: last for term, _, last in group["measured"]}
    return {name: step + max(every, step - lasts.get(name, 0)) for name in names}


def decay_of_norms(beta3: float, every: int) -> float:
    """The decay of the gradient norms' average for each measurement."""
    return beta3 if every == 1 else float(beta3 ** min(1, every / AVERAGED))
