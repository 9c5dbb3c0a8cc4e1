"""Draws metrics by epoch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_mtadam.metrics import FrechetInceptionDistance, FrechetVGG16Distance

DISTANCES = (FrechetInceptionDistance.label, FrechetVGG16Distance.label)
COLUMNS = 3  # panels beside each other


History = Sequence[Mapping[str, float]]  # "epoch" and the metrics, of each evaluation


def draw_curves(histories: Mapping[str, History], path: Path) -> None:
    """Draw a panel per metric, with a line and a colour per method: the mean of its seeds, in a band of all of them.

    Args:
        histories: by label; "n", the number of images, stands beside a Frechet distance. Labels that are the same up
            to ", seed" are seeds of one method.
        path: of the PNG file.
    """
    newest = next(iter(histories.values()))[-1]
    metrics = [name for name in newest if name.split()[-1] not in ("epoch", "n")]
    groups: dict[str, list[History]] = {}
    for label, history in histories.items():
        groups.setdefault(label.partition(", seed")[0], []).append(history)
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, index + 1)
        for colour, seeds in enumerate(groups.values()):
            draw_method(axes, seeds, metric, f"C{colour}")
        axes.set(title=title_of(metric, newest), xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if list(groups) != [""]:
        lines = [Line2D([], [], color=f"C{colour}", marker=".") for colour in range(len(groups))]
        figure.legend(lines, list(groups), loc="outside lower center", ncols=columns, fontsize=9)
    figure.savefig(path, dpi=90)


def title_of(metric: str, newest: Mapping[str, float]) -> str:
    """The metric, and of how many images it is if that matters.

    Example:
        >>> title_of("set14 FID", {"set14 FID": 90.0, "set14 n": 14})
        'set14 FID, n = 14'
    """
    images, _, name = metric.rpartition(" ")
    return f"{metric}, n = {newest[f'{images} n'.strip()]:g}" if name.startswith(DISTANCES) else metric


def draw_method(axes: Axes, seeds: Sequence[History], metric: str, colour: str) -> None:
    """The mean of the seeds in one panel, and a band from the lowest to the highest, as far as all of them go."""
    together = list(zip(*seeds, strict=False))
    epochs = [rows[0]["epoch"] for rows in together]
    values = [[row[metric] for row in rows] for rows in together]
    axes.plot(epochs, [statistics.fmean(found) for found in values], marker=".", color=colour)
    if len(seeds) > 1:
        axes.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2, linewidth=0)
