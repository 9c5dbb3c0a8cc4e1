"""What was logged over the steps, in little memory: for pictures of a whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

AT_MOST = 1000


class History:
    """Values by name, over the steps. A run of any length takes as little: neighbours are joined, extremes are kept.

    Attributes:
        steps: where there are values, ascending: [N].
        series: N values by name; nan where there was none.

    Example:
        >>> history = History()
        >>> history.add(0, {"fit": 1.0})
        >>> history.add(10, {"fit": 1.0, "size": 30.0})
        >>> history.steps, history.series
        ([0, 10], {'fit': [1.0, 1.0], 'size': [nan, 30.0]})
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.series: dict[str, list[float]] = {}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step; of one that was there already, as after a resume, those that are new count."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            for one in self.series.values():
                one.pop()
        for name in values:
            self.series.setdefault(name, [math.nan] * len(self.steps))
        self.steps.append(step)
        for name, one in self.series.items():
            one.append(values.get(name, math.nan))
        if len(self.steps) > AT_MOST:
            kept = len(self.steps) // 4 * 4
            self.steps = [*self.steps[:kept:2], *self.steps[kept:]]
            self.series = {name: [*_halved(one[:kept]), *one[kept:]] for name, one in self.series.items()}

    def state_dict(self) -> dict[str, Any]:
        """All of it, in lists."""
        return {"steps": list(self.steps), "series": {name: list(one) for name, one in self.series.items()}}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> History:
        """What ``state_dict`` gave."""
        history = cls()
        history.steps = list(state_dict["steps"])
        history.series = {name: list(one) for name, one in state_dict["series"].items()}
        return history


def _halved(values: list[float]) -> list[float]:
    """Of every four neighbours the lowest and the highest, in their order: no outlier is lost."""
    found: list[float] = []
    for at in range(0, len(values), 4):
        present = [place for place in range(at, at + 4) if not math.isnan(values[place])] or [at]
        low, high = (choose(present, key=values.__getitem__) for choose in (min, max))
        found += [values[low], values[high]] if low <= high else [values[high], values[low]]
    return found
