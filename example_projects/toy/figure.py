"""Draws the normalised loss of every run, and the weights that GradNorm and MTAdam found, against the step."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from example_projects.toy.methods import METHODS, SHARED, terms_of

Curve = list[tuple[int, float]]  # steps and values


def read_curve(run: Path, column: str) -> Curve:
    """A column of a run's logged metrics, where it has a value."""
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]


def weight_curves(run: Path, tasks: int) -> list[Curve]:
    """The weights by task, which sum to T: GradNorm's, or the inverses of MTAdam's norms at the shared layer."""
    weights = [read_curve(run, f"term_weight/{term}") for term in terms_of(tasks)]
    if all(weights):
        return weights
    norms = [read_curve(run, f"balance_weight.{term}/{SHARED}") for term in terms_of(tasks)]
    rows = [normalised([1 / value for _, value in row]) for row in zip(*norms, strict=True)]
    steps = [step for step, _ in norms[0]]
    return [list(zip(steps, column, strict=True)) for column in zip(*rows, strict=True)]


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights times a factor that makes them sum to their number.

    Example:
        >>> normalised([1.0, 3.0])
        [0.5, 1.5]
    """
    return [len(weights) * weight / sum(weights) for weight in weights]


def draw(runs: Mapping[str, Sequence[Path]], sigmas: Sequence[float], path: Path) -> None:
    """Draw a panel of the losses and one of the weights for each method that learns them, as a PNG file.

    Args:
        runs: the folders of each method's runs; the weights are those of the first.
        sigmas: the scales of the tasks; the oracle's weights are drawn as dotted lines.
        path: of the PNG file.
    """
    learning = [name for name in runs if METHODS[name].has_weights]
    figure = Figure(figsize=(4.4 * (1 + len(learning)), 3.6), layout="constrained")
    losses, *others = figure.subplots(1, 1 + len(learning), squeeze=False)[0]
    for index, (name, folders) in enumerate(runs.items()):
        for number, folder in enumerate(folders):
            curve = read_curve(folder, "validation/normalised_loss")
            losses.plot(*zip(*curve, strict=True), color=f"C{index}", label="" if number else name, linewidth=1)
    losses.set(title="normalised test loss", xlabel="step")
    losses.legend(fontsize=8)
    for axes, name in zip(others, learning, strict=True):
        draw_weights(axes, weight_curves(runs[name][0], len(sigmas)), sigmas)
        axes.set_title(f"weights, {name}")
    for axes in (losses, *others):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def draw_weights(axes: Axes, curves: Sequence[Curve], sigmas: Sequence[float]) -> None:
    """A line per task, and a dotted one for the oracle's weight."""
    for index, (curve, weight) in enumerate(zip(curves, normalised([s**-2 for s in sigmas]), strict=True)):
        axes.plot(*zip(*curve, strict=True), color=f"C{index}", linewidth=1, label=f"sigma {sigmas[index]:.3g}")
        axes.axhline(weight, color=f"C{index}", linestyle=":", linewidth=1)
    axes.set(yscale="log", xlabel="step")
    axes.legend(fontsize=7, ncols=2)
