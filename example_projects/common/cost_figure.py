"""Draw quality against wall time, a panel per results.csv of a project, a dot per run and a line per method's median.

The time of a method is the median of its runs' seconds per step, relative to that of the baseline.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from example_projects.common.command import run_command


def read(path: Path, column: str, baseline: str) -> dict[str, tuple[float, list[float]]]:
    """The relative time and the runs' figures of each method in a results.csv.

    Raises:
        ValueError: the file has no run, none of the baseline, or no such column.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"There is no run in {path}. Give the results.csv of a command that has ended.")
    for wanted in (column, "method", "seconds_per_step"):
        if wanted not in rows[0]:
            raise ValueError(f"{path} has no column {wanted!r}. It has {list(rows[0])}.")
    if all(row["method"] != baseline for row in rows):
        raise ValueError(
            f"{path} has no run of {baseline!r}, to which times are relative. Run it with that method too."
        )
    seconds = {
        method: statistics.median(float(row["seconds_per_step"]) for row in rows if row["method"] == method)
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    return {
        method: (time / seconds[baseline], [float(row[column]) for row in rows if row["method"] == method])
        for method, time in seconds.items()
    }


def draw(axes: Axes, column: str, methods: dict[str, tuple[float, list[float]]], *, logarithmic: bool) -> None:
    """One panel: time to the right, the figure upwards."""
    for method, (time, found) in methods.items():
        (dots,) = axes.plot([time] * len(found), found, "o", fillstyle="none", markersize=4, label=method)
        axes.plot(time, statistics.median(found), "_", color=dots.get_color(), markersize=12, markeredgewidth=2)
    axes.set(yscale="log" if logarithmic else "linear", xlabel="time of a step, relative", title=column)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m example_projects.common.cost_figure", description=__doc__)
    add = parser.add_argument
    add("--panel", nargs=2, action="append", required=True, metavar=("RESULTS", "COLUMN"),
        help="a results.csv and the column that is drawn; again for a further panel")  # fmt: skip
    add("--logarithmic", nargs="*", default=["relative_error"], metavar="COLUMN", help="columns on a logarithmic scale")
    add("--baseline", default="adam", help="the method whose step takes 1")
    add("--output", type=Path, required=True, help="the PNG file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    figure = Figure(figsize=(5.2 * len(options.panel), 3.8), layout="constrained")
    for axes, (path, column) in zip(
        figure.subplots(1, len(options.panel), squeeze=False)[0], options.panel, strict=True
    ):
        methods = read(Path(path), column, options.baseline)
        draw(axes, column, methods, logarithmic=column in options.logarithmic)
    figure.savefig(options.output, dpi=110)
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    run_command(main)
