"""The report of a comparison: its table, the curves of all runs, and samples of all methods beside each other."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from example_projects.common import report
from example_projects.common.choosing import HELD_BACK, best_rates, of_these_rates, rates_table
from example_projects.common.command import write_rows
from example_projects.common.curves import draw_curves
from example_projects.common.full_size import note_on, numbers_for
from example_projects.common.image_command import chooses, columns_of, reservation
from example_projects.common.image_project import ImageProject
from example_projects.common.runs import Result
from example_projects.common.sheet import draw_samples

Numbers = Mapping[str, Mapping[str, float]]  # by method and column


def write_comparison(project: ImageProject, options: argparse.Namespace, results: Sequence[Result]) -> str:
    """Write ``comparison.md`` with its table, ``curves.png`` and ``samples.png`` to ``options.output_dir``.

    Runs that were only measured at their end have no curves.

    Args:
        project: what was trained.
        options: of its command.
        results: of its runs, in the order of the table.

    Returns:
        The table and its notes, as Markdown.
    """
    folder = options.output_dir
    judged = [result for result in results if not chooses(options) or result.get("seed") == options.seeds[0]]
    metric = metric_of_choice(project, options, judged)
    shown = of_these_rates(results, best_rates(judged, metric))
    paper = numbers_for(project, options)
    rows = report.summarise(shown if chooses(options) else results, "method", columns_of(project, results))
    notes = ["Mean +- standard deviation over the runs.", note_on(project, options, paper), reservation(options)]
    table = write_rows(options, beside(rows, paper, "paper, full size"), results, " ".join(notes).rstrip())
    trained = [result for result in shown if "folder" in result]
    curves = {f"{run['method']}, seed {run['seed']}": read_curve(folder / run["folder"]) for run in trained}
    measured = {label: curve for label, curve in curves.items() if curve}
    if measured:
        draw_curves(measured, folder / "curves.png")
    finals = {run["method"]: folder / run["folder"] / "final" for run in reversed(trained)}
    draw_samples(dict(reversed(finals.items())), folder / "samples.png")
    (folder / "comparison.md").write_text(
        f"# {project.name}, {options.setting}\n\n{table}\n\n"
        + on_rates(options, judged, metric)
        + ("![Metrics by epoch: the mean of the seeds, and all of them](curves.png)\n\n" if measured else "")
        + f"![Input, what each method made of it with seed {options.seeds[0]}, and the truth](samples.png)\n"
    )
    return table


def metric_of_choice(project: ImageProject, options: argparse.Namespace, results: Sequence[Result]) -> str:
    """By what learning rates are chosen: ``--search-metric`` or, if it was not measured, the first column that was."""
    wanted: str = options.search_metric
    known = any(name in result for result in results for name in (wanted, HELD_BACK + wanted))
    return wanted if known else columns_of(project, results)[0]


def on_rates(options: argparse.Namespace, results: Sequence[Result], metric: str) -> str:
    """How learning rates were chosen; empty, if there is but one."""
    if len(options.lr) == 1:
        return ""
    if not chooses(options):
        return f"Curves and samples are those of each method's best learning rate by {metric}, of the same images.\n\n"
    return (
        f"Learning rates were chosen by {metric} of the {options.validation} images that were held back from training,"
        f" with seed {options.seeds[0]}:\n\n{report.markdown(rates_table(results, metric))}\n\n"
    )


def beside(rows: Sequence[Mapping[str, str]], paper: Numbers, label: str = "paper") -> list[dict[str, str]]:
    """The rows of a table with the paper's numbers in columns of their own, beside those that the paper has.

    Args:
        rows: each of a method, which may be followed by its learning rate, as in "adam, lr 0.002".
        paper: the paper's numbers by method and column.
        label: what the columns with the paper's numbers are called by.

    Example:
        >>> beside([{"method": "adam", "L1": "40", "L2": "50"}], {"adam": {"L1": 41.0}, "mtadam": {"L1": 30.0}})
        [{'method': 'adam', 'L1': '40', 'L1 (paper)': '41.0', 'L2': '50'}]
    """
    known = {column for numbers in paper.values() for column in numbers}
    wide = []
    for row in rows:
        numbers = paper.get(row["method"].partition(", lr ")[0], {})
        wide.append({})
        for column, value in row.items():
            wide[-1][column] = value
            if column in known:
                wide[-1][f"{column} ({label})"] = str(numbers.get(column, ""))
    return wide


def read_curve(run: Path) -> list[dict[str, float]]:
    """The metrics of a run, epoch by epoch; none if it had fewer epochs than ``--metrics-every``."""
    if not (run / "curve.csv").exists():
        return []
    with (run / "curve.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
