"""The table of one problem: what a method reaches, how far that depends on what it was given, and what it costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from example_projects.common.run_file import Run
from example_projects.sensitivity.cells import cells_of, seconds_per_step
from example_projects.sensitivity.methods import METHODS
from example_projects.sensitivity.search import hyperband, random_search


def of_method(runs: Sequence[Run], method: str) -> list[Run]:
    """The runs of a method."""
    return [run for run in runs if run["method"] == method]


def table(runs: Sequence[Run], terms: int) -> list[dict[str, str]]:
    """One row per method, in the order of the methods.

    Args:
        runs: of one problem.
        terms: how many the problem has.
    """
    adam = of_method(runs, "adam")
    return [row(name, of_method(runs, name), adam, terms) for name in METHODS if of_method(runs, name)]


def row(name: str, runs: Sequence[Run], adam: Sequence[Run], terms: int) -> dict[str, str]:
    """The row of a method."""
    cells = cells_of(runs)
    at_best, everything = cells.best().values(), cells.all()
    passes = METHODS[name].passes(terms, int(runs[0]["steps"]))
    return {
        "method": name,
        "runs": str(cells.runs),
        "lr": f"{cells.best_lr():g}",
        "best": shown(min(everything)),
        "median": shown(statistics.median(everything)),
        "worst": shown(max(everything)),
        "median spread, best lr": shown(cells.tuned()),
        "worst spread, best lr": shown(max(at_best)),
        "backwards": f"{passes:.3g}" + (f" + {terms} small" if METHODS[name].small_passes else ""),
        "seconds": shown(seconds_per_step(runs) / seconds_per_step(adam)) if adam else "",
        "random search": searched(random_search(adam, cells.tuned()), len(adam)),
        "Hyperband": searched(hyperband(adam, cells.tuned()), len(adam)),
    }


def shown(value: float) -> str:
    """Three digits; a run that diverged has none."""
    return f"{value:.3g}" if math.isfinite(value) else "diverged"


def searched(cost: float, runs: int) -> str:
    """The number of Adam's runs, or that none of them was good enough."""
    return f"{cost:.1f}" if math.isfinite(cost) else f"none of {runs}"
