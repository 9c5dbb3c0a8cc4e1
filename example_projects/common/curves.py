"""Draws metrics by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def draw_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw a panel per metric with a line per history, as a PNG file.

    Args:
        histories: by label, a mapping with "epoch" and the metrics per evaluation; "n" is left out. Labels that begin
            alike, up to ", seed", share a colour.
        path: of the PNG file.
    """
    metrics = [name for name in next(iter(histories.values()))[0] if name not in ("epoch", "n")]
    groups = list(dict.fromkeys(label.partition(", seed")[0] for label in histories))
    figure = Figure(figsize=(4.2 * len(metrics), 3.4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for label, history in histories.items():
            group = label.partition(", seed")[0]
            first = label == next(other for other in histories if other.partition(", seed")[0] == group)
            axes.plot(
                [row["epoch"] for row in history],
                [row[metric] for row in history],
                marker=".",
                color=f"C{groups.index(group)}",
                label=group if first else None,
            )
        axes.set(title=metric, xlabel="epoch")
        axes.grid(alpha=0.3)
        if groups != [""]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)
