"""Draws metrics by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_mtadam.metrics import FrechetInceptionDistance, FrechetVGG16Distance

DISTANCES = (FrechetInceptionDistance.label, FrechetVGG16Distance.label)
COLUMNS = 3  # panels beside each other


def draw_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw a panel per metric with a line per history, as a PNG file.

    Args:
        histories: by label, a mapping with "epoch" and the metrics per evaluation; "n", the number of images, stands
            beside a Frechet distance. Labels that are the same up to ", seed" share a colour and a place in the legend.
        path: of the PNG file.
    """
    newest = next(iter(histories.values()))[-1]
    metrics = [name for name in newest if name not in ("epoch", "n")]
    groups = list(dict.fromkeys(label.partition(", seed")[0] for label in histories))
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = [figure.add_subplot(rows, columns, index + 1) for index in range(len(metrics))]
    for axes, metric in zip(panels, metrics, strict=True):
        for label, history in histories.items():
            colour = f"C{groups.index(label.partition(', seed')[0])}"
            axes.plot([row["epoch"] for row in history], [row[metric] for row in history], marker=".", color=colour)
        axes.set(title=f"{metric}, n = {newest['n']:g}" if metric.startswith(DISTANCES) else metric, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if groups != [""]:
        lines = [Line2D([], [], color=f"C{index}", marker=".") for index in range(len(groups))]
        figure.legend(lines, groups, loc="outside lower center", ncols=columns, fontsize=9)
    figure.savefig(path, dpi=90)
