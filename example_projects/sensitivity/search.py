"""What it costs to find weights and a learning rate for plain Adam that are as good as a method without weights."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

from example_projects.common.run_file import Run

REPEATS = 2000
SHORT, LONG = 4, 2  # of one round of Hyperband: runs of a quarter, the best of which goes on, and whole runs


def random_search(runs: Sequence[Run], target: float) -> float:
    """The expected number of runs until one is as good as the target, infinite if none is.

    The searcher draws from the grid without putting back: of N runs, m of which are good, (N + 1) / (m + 1).

    Args:
        runs: Adam's on the sum: each spread is a weight that might be tried.
        target: the figure to reach, the smaller the better.
    """
    good = sum(float(run["value"]) <= target for run in runs)
    return (len(runs) + 1) / (good + 1) if good else math.inf


def hyperband(runs: Sequence[Run], target: float) -> float:
    """The mean cost of Hyperband, in whole runs, until one is as good as the target, infinite if none is.

    Hyperband with a reduction of 4 and a quarter of a run as its smallest budget, played back from the file: rounds of
    four runs of a quarter, of which the one that is best by then goes on to its end, and two whole runs.

    Args:
        runs: as for :func:`random_search`.
        target: likewise.
    """
    if math.isinf(random_search(runs, target)):
        return math.inf
    pool = [(float(run["early"]), float(run["value"])) for run in runs]
    generator = random.Random(0)
    return statistics.fmean(_one_search(pool, target, generator) for _ in range(REPEATS))


def _one_search(pool: Sequence[tuple[float, float]], target: float, generator: random.Random) -> float:
    cost = 0.0
    while True:
        _, value = min(generator.choices(pool, k=SHORT))
        cost += SHORT / 4 + 3 / 4
        if value <= target:
            return cost
        for _, value in generator.choices(pool, k=LONG):
            cost += 1
            if value <= target:
                return cost
