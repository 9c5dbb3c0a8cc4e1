"""The figures: one for each claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from example_projects.common.run_file import Run
from example_projects.evidence.methods import METHODS
from example_projects.evidence.panels import LINES, draw_lines, label_ends, make_panels, name_axis, plain_numbers
from example_projects.evidence.record import chosen_tests, loss_of, matching
from example_projects.evidence.search import replay
from example_projects.evidence.tables import SEARCHED, groups, of_methods, quartiles, ratios_of, trials_of

POINTS = 40  # of a curve over seconds


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw what there are runs for: failed.png, quality.png, factors.png, budget.png and cost.png.

    Args:
        runs: of all problems.
        folder: where the files go.

    Returns:
        The files.
    """
    found = {"failed": failed(runs), "quality": quality(runs), "factors": by_factor(runs), "budget": budget(runs)}
    figures = {**found, "cost": cost(runs)}
    written = {folder / f"{name}.png": figure for name, figure in figures.items() if figure is not None}
    for file, figure in written.items():
        figure.savefig(file, dpi=100)
    return list(written)


def failed(runs: Sequence[Run]) -> Figure | None:
    """A field per method, and per problem and factor, with the number of failed runs."""
    counted: dict[str, dict[str, tuple[int, int]]] = {}
    columns = []
    for (problem, factor), own in groups(matching(runs, stage="test") + matching(runs, stage="search")):
        column = problem if factor == "1" else f"{problem}, x {factor}"
        for name, theirs in of_methods(own).items():
            tests = chosen_tests(theirs)
            if tests:
                counted.setdefault(name, {})[column] = sum(run["failed"] == "1" for run in tests), len(tests)
        columns.append(column)
    names = [name for name in METHODS if name in counted]
    if not names:
        return None
    figure = Figure(figsize=(2.2 + 0.75 * len(columns), 1.6 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    shares = [[_share(counted[name].get(column)) for column in columns] for name in names]
    axes.imshow(shares, cmap="Reds", vmin=0, vmax=1.4, aspect="auto")
    for row, name in enumerate(names):
        for at, column in enumerate(columns):
            bad, total = counted[name].get(column, (0, 0))
            axes.text(at, row, f"{bad}/{total}" if total else "", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), [METHODS[name].label for name in names])
    axes.set_title("failed runs: fewer is better", fontsize=10)
    return figure


def quality(runs: Sequence[Run]) -> Figure | None:
    """A panel per problem, without factors: a dot per run, and the median and the quartiles of each method."""
    found = {problem: tests_of(own) for (problem, factor), own in groups(runs) if factor == "1"}
    found = {problem: tests for problem, tests in found.items() if tests}
    if not found:
        return None
    figure, panels = make_panels(len(found), height=2.9)
    for axes, (problem, tests) in zip(panels, found.items(), strict=False):
        for row, (name, losses) in enumerate(tests.items()):
            finite = [loss for loss in losses if math.isfinite(loss)]
            colour = LINES.get(name, "0.45")
            axes.plot(finite, [row] * len(finite), "|", color=colour, alpha=0.35, markersize=7)
            low, median, high = quartiles(losses)
            if math.isfinite(high):
                axes.plot([low, high], [row, row], color=colour, linewidth=2.5)
                axes.plot(median, row, "o", color=colour, markersize=5)
        if SEARCHED in tests:
            axes.axvspan(*quartiles(tests[SEARCHED])[::2], color="black", alpha=0.08, linewidth=0)
        axes.set_yticks(range(len(tests)), [METHODS[name].label for name in tests], fontsize=7)
        axes.invert_yaxis()
        name_axis(axes, "x", runs, problem)
        axes.set_title(problem, fontsize=10)
    return figure


def by_factor(runs: Sequence[Run]) -> Figure | None:
    """A panel per problem: the median and the quartiles against the factor."""
    curves: dict[str, dict[str, dict[float, tuple[float, float, float]]]] = {}
    for (problem, factor), own in groups(runs):
        for name, losses in tests_of(own).items():
            curves.setdefault(problem, {}).setdefault(name, {})[float(factor)] = quartiles(losses)
    curves = {
        problem: {name: line for name, line in lines.items() if len(line) > 1}
        for problem, lines in curves.items()
        if any(len(line) > 1 for line in lines.values())
    }
    if not curves:
        return None
    figure, panels = make_panels(len(curves))
    for axes, (problem, lines) in zip(panels, curves.items(), strict=False):
        ends = draw_lines(axes, lines)
        axes.set(xscale="log", xlabel="factor on the last loss")
        name_axis(axes, "y", runs, problem)
        label_ends(axes, ends)
        axes.set_title(problem, fontsize=10)
    return figure


def budget(runs: Sequence[Run]) -> Figure | None:
    """A panel per problem, without factors: what the search had reached against the seconds that it had taken."""
    found = {problem: matching(own, stage="search") for (problem, factor), own in groups(runs) if factor == "1"}
    found = {problem: own for problem, own in found.items() if own}
    if not found:
        return None
    figure, panels = make_panels(len(found))
    for axes, (problem, own) in zip(panels, found.items(), strict=False):
        lines = {}
        for name, search in of_methods(own).items():
            trials = trials_of(search)
            total, shortest = sum(cost for cost, _ in trials), min(cost for cost, _ in trials if cost > 0)
            times = [shortest * (total / shortest) ** (at / (POINTS - 1)) for at in range(POINTS)]
            sign = -1 if own[0]["better"] == "higher" else 1
            bests = map(quartiles, replay(trials, times))
            lines[name] = {
                time: (sign * low, sign * median, sign * high)
                for time, (low, median, high) in zip(times, bests, strict=True)
            }
        ends = draw_lines(axes, lines)
        axes.set(xscale="log", xlabel="processor seconds, search included")
        plain_numbers(axes.xaxis)
        name_axis(axes, "y", runs, problem, what="validation ")
        label_ends(axes, ends)
        axes.set_title(problem, fontsize=10)
    return figure


def cost(runs: Sequence[Run]) -> Figure | None:
    """A panel per problem: a dot per run, the processor time over Adam's."""
    found = {run["problem"]: ratios_of(runs, run["problem"]) for run in matching(runs, stage="cost")}
    if not found:
        return None
    figure, panels = make_panels(len(found), height=2.6)
    for axes, (problem, ratios) in zip(panels, found.items(), strict=False):
        for row, (name, values) in enumerate(ratios.items()):
            axes.plot(values, [row] * len(values), "o", color=LINES.get(name, "0.45"), fillstyle="none", markersize=4)
        axes.set_yticks(range(len(ratios)), [METHODS[name].label for name in ratios], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("processor time over Adam's\n(lower is better)", fontsize=8)
        axes.set_title(problem, fontsize=10)
        axes.grid(alpha=0.3)
    return figure


def tests_of(runs: Sequence[Run]) -> dict[str, list[float]]:
    """By method the test figures of what its search has found, as they are; infinite for what diverged."""
    sign = -1 if runs and runs[0]["better"] == "higher" else 1
    tests = {name: [sign * loss_of(run, "test") for run in chosen_tests(own)] for name, own in of_methods(runs).items()}
    return {name: values for name, values in tests.items() if values}


def _share(counts: tuple[int, int] | None) -> float:
    return counts[0] / counts[1] if counts else math.nan
