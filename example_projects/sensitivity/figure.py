"""The figure of one problem: the metric against the spread, a panel for each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from example_projects.common.run_file import Run
from example_projects.sensitivity.cells import Cells, cells_of
from example_projects.sensitivity.methods import METHODS
from example_projects.sensitivity.table import of_method

COLUMNS = 4
ORACLE = "adam-by-hand"


def draw(runs: Sequence[Run], metric: str, file: Path) -> None:
    """Draw the best and the worst over the learning rates, and the oracle's best into every panel.

    Args:
        runs: of one problem.
        metric: its name.
        file: the PNG file.
    """
    found = {name: cells_of(of_method(runs, name)) for name in METHODS if of_method(runs, name)}
    rows = math.ceil(len(found) / COLUMNS)
    figure = Figure(figsize=(3.1 * COLUMNS, 2.3 * rows + 0.7), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (name, cells) in zip(panels, found.items(), strict=False):
        panel(axes, name, cells, found.get(ORACLE))
    for axes in panels[len(found) - COLUMNS : len(found)]:  # the last of each column, whatever is below
        axes.tick_params(labelbottom=True)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supxlabel("spread of the factors on the losses")
    figure.supylabel(metric)
    figure.savefig(file, dpi=90)


def panel(axes: Axes, name: str, cells: Cells, oracle: Cells | None) -> None:
    """One method."""
    if oracle is not None:
        axes.plot(*_line(oracle.best()), ":", color="black", label=f"{ORACLE}, best learning rate")
    best, worst = cells.best(), cells.worst()
    axes.plot(*_line(best), "o-", markersize=4, label="best learning rate")
    axes.plot(*_line(worst), "s--", markersize=4, label="worst learning rate")
    both = [spread for spread in best if math.isfinite(worst[spread])]
    axes.fill_between(both, [best[spread] for spread in both], [worst[spread] for spread in both], alpha=0.15)
    axes.set(xscale="log", yscale="log", title=name)
    axes.grid(alpha=0.3)


def _line(values: dict[float, float]) -> tuple[list[float], list[float]]:
    """Abscissas and ordinates of what is finite."""
    finite = {spread: value for spread, value in values.items() if math.isfinite(value)}
    return list(finite), list(finite.values())
