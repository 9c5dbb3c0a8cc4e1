"""What became of one method on one problem: the median over the seeds, by spread and learning rate."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from example_projects.common.run_file import Run


@dataclass(frozen=True)
class Cells:
    """The figures of a method, the smaller the better.

    Attributes:
        values: by spread and learning rate.
        runs: how many there are of.
    """

    values: dict[float, dict[float, float]]
    runs: int

    def best(self) -> dict[float, float]:
        """By spread, at the best learning rate."""
        return {spread: min(row.values()) for spread, row in self.values.items()}

    def worst(self) -> dict[float, float]:
        """By spread, at the worst learning rate."""
        return {spread: max(row.values()) for spread, row in self.values.items()}

    def all(self) -> list[float]:
        """Of all spreads and learning rates."""
        return [value for row in self.values.values() for value in row.values()]

    def tuned(self) -> float:
        """The median over the spreads, each at its best learning rate."""
        return statistics.median(self.best().values())

    def best_lr(self) -> float:
        """The learning rate with the best median over the spreads."""
        by_lr: dict[float, list[float]] = defaultdict(list)
        for row in self.values.values():
            for lr, value in row.items():
                by_lr[lr].append(value)
        return min(by_lr, key=lambda lr: statistics.median(by_lr[lr]))


def cells_of(runs: Sequence[Run]) -> Cells:
    """Summarise the runs of one method on one problem."""
    found: dict[float, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[float(run["spread"])][float(run["lr"])].append(float(run["value"]))
    values = {
        spread: {lr: statistics.median(found[spread][lr]) for lr in sorted(found[spread])} for spread in sorted(found)
    }
    return Cells(values, len(runs))


def seconds_per_step(runs: Sequence[Run]) -> float:
    """The median over the runs that did not diverge; nan if all did."""
    times = [float(run["seconds_per_step"]) for run in runs if math.isfinite(float(run["value"]))]
    return statistics.median(times) if times else math.nan
