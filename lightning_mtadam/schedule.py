"""What is counted of an optimizer's steps, and which of them measure the balance: each term in its own time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

_Group: TypeAlias = dict[str, Any]

AVERAGED = 20  # measurements so many steps apart are averaged with beta3 itself; closer ones count less

COUNTED: Mapping[str, Any] = {"steps": 0, "measured": (), "awaited": ()}
"""What is counted of the whole optimizer, as it begins, in tuples, which every kind of checkpoint takes.

The steps; of each term the first and the last step in which it was measured; of a term that came too late in its step
to be measured, until which step it is waited for.
"""


def begin_anew(groups: Sequence[_Group]) -> None:
    """Count no steps, and no terms that were measured: of the whole optimizer, in all of its groups."""
    for group in groups:
        group.update(COUNTED)


def count(
    groups: Sequence[dict[str, Any]], before: dict[str, Any], measured: Iterable[str], awaited: Mapping[str, int]
) -> None:
    """Count one more step, in which these terms were ``measured``; what was counted ``before`` is kept there.

    ``awaited`` are those that could not be, and until which step they are waited for.
    """
    before.update({key: groups[0][key] for key in COUNTED})
    step, spans = before["steps"], {term: (first, last) for term, first, last in before["measured"]}
    spans.update({term: (spans.get(term, (step,))[0], step) for term in measured})
    waits = {term: until for term, until in (*before["awaited"], *awaited.items()) if until > step}
    found = {
        "steps": step + 1,
        "measured": tuple((term, *span) for term, span in spans.items()),
        "awaited": tuple((term, until) for term, until in waits.items() if term not in measured),
    }
    for group in groups:
        group.update(found)


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
