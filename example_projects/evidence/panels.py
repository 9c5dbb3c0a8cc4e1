"""Parts of the figures: panels, lines with their spread, names at lines and axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from example_projects.common.run_file import Run
from example_projects.evidence.methods import METHODS
from example_projects.evidence.record import matching
from example_projects.evidence.tables import SEARCHED

# The few that have a line where there are lines.
LINES = {"adam_sum": "0.6", SEARCHED: "black", "mtadam_paper": "C1", "recommended": "C0"}
COLUMNS = 3
LABEL_HEIGHT = 0.08  # of a panel


def draw_lines(axes: Axes, lines: Mapping[str, Mapping[float, tuple[float, float, float]]]) -> dict[str, float]:
    """The median with a band between the quartiles, for those that have lines; where each line ends."""
    ends = {}
    for name, colour in LINES.items():
        finite = {x: y for x, y in sorted(lines.get(name, {}).items()) if all(map(math.isfinite, y))}
        if finite:
            low, median, high = zip(*finite.values(), strict=True)
            axes.plot(list(finite), median, color=colour, linewidth=1.5)
            axes.fill_between(list(finite), low, high, color=colour, alpha=0.15, linewidth=0)
            ends[name] = median[-1]
    return ends


def label_ends(axes: Axes, ends: Mapping[str, float]) -> None:
    """Names beside the ends of lines, above each other, none above the panel."""
    to_fraction = axes.transScale + axes.transLimits
    x, _ = axes.get_xlim()[1], axes.get_ylim()  # the limits are set when they are asked for
    heights: dict[str, float] = {}
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        below = max(heights.values(), default=-math.inf)
        heights[name] = max(float(to_fraction.transform((x, end))[1]), below + LABEL_HEIGHT)
    top = 1.0
    for name, height in reversed(heights.items()):
        height = min(height, top)
        axes.text(
            1.02, height, METHODS[name].label, transform=axes.transAxes, color=LINES[name], fontsize=7, va="center"
        )
        top = height - LABEL_HEIGHT


def name_axis(axes: Axes, which: Literal["x", "y"], runs: Sequence[Run], problem: str, what: str = "test ") -> None:
    """The axis of a figure: its name, which way is better, and a logarithmic scale where less is better."""
    run = matching(runs, problem=problem)[0]
    lower = run["better"] == "lower"
    label = f"{what}{run['figure'].replace('_', ' ')}\n({run['better']} is better)"
    axes.set(**{f"{which}label": label})
    if lower:
        axes.set(**{f"{which}scale": "log"})
        plain_numbers(axes.xaxis if which == "x" else axes.yaxis)
    axes.grid(alpha=0.3)


class PlainNumbers(LogFormatter):
    """Numbers without powers, at those places of a logarithmic axis that have one."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The number, or nothing."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def plain_numbers(axis: Axis) -> None:
    """Numbers without powers on a logarithmic axis; between the powers of ten too, where these are few."""
    axis.set_major_formatter(PlainNumbers())
    axis.set_minor_formatter(PlainNumbers(minor_thresholds=(1.5, 0.6)))
    axis.set_tick_params(which="both", labelsize=7)


def make_panels(count: int, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels."""
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels
