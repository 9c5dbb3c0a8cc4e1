"""Some of all combinations of options, chosen so that few tests show much."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def every(nth: int, *choices: Sequence[Any], others: bool = False) -> list[tuple[Any, ...]]:
    """Every n-th combination of a choice from each, or all the other ones.

    Kept is a combination whose places add up to a multiple of n. ``meeting`` tells what is together in those.

    Example:
        >>> every(2, "ab", "xy")
        [('a', 'x'), ('b', 'y')]
    """
    places = itertools.product(*(range(len(among)) for among in choices))
    kept = [place for place in places if (sum(place) % nth == 0) is not others]
    return [tuple(among[at] for among, at in zip(choices, place, strict=True)) for place in kept]


def meeting(together: int, kept: Sequence[tuple[Any, ...]], *choices: Sequence[Any]) -> bool:
    """Whether every so many choices are together in one of the combinations."""
    return all(
        set(itertools.product(*(choices[place] for place in places)))
        <= {tuple(one[place] for place in places) for one in kept}
        for places in itertools.combinations(range(len(choices)), together)
    )
