"""What was logged over the steps, in little memory: for pictures of a whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

AT_MOST = 1000


class History:
    """Values by name, over the steps. A run of any length takes as little: neighbors are joined, extremes are kept.

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
            self._join_neighbors()

    def _join_neighbors(self) -> None:
        """Keep two values of each cell of steps: of each series the lowest and the highest, in their order.

        Cells are as wide as a power of two and begin at its multiples, so that what was joined is not moved again
        until they are twice as wide.
        """
        width = 2 ** math.ceil(math.log2(4 * (self.steps[-1] - self.steps[0]) / AT_MOST))
        cells = [list(cell) for _, cell in groupby(range(len(self.steps)), lambda at: self.steps[at] // width)]
        steps = self.steps
        self.steps = [steps[at] for cell in cells for at in dict.fromkeys((cell[0], cell[len(cell) // 2]))]
        self.series = {
            name: [value for cell in cells for value in _extremes([values[at] for at in cell])]
            for name, values in self.series.items()
        }

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


def _extremes(values: list[float]) -> list[float]:
    """The lowest and the highest, in their order; what is not more than two as it is."""
    if len(values) <= 2:
        return values
    present = [at for at, value in enumerate(values) if not math.isnan(value)] or [0]
    low, high = (choose(present, key=values.__getitem__) for choose in (min, max))
    return [values[min(low, high)], values[max(low, high)]]
