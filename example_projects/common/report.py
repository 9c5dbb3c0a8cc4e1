"""Tables of results, as text, Markdown and CSV."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Row = Mapping[str, object]


def mean_and_spread(values: Sequence[float]) -> str:
    """``mean +- standard deviation``; the value alone if there is but one.

    Example:
        >>> mean_and_spread([97.0, 98.0, 99.0])
        '98.00 +- 1.00'
        >>> mean_and_spread([0.1234])
        '0.123'
        >>> mean_and_spread([3812.4, 3830.2])
        '3821 +- 13'
    """
    largest = max(map(abs, values))
    digits = 4 if 0 < largest < 0.1 else 3 if 0 < largest < 1 else 2 if not largest >= 1000 else 0
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def median_and_range(values: Sequence[float]) -> str:
    """``median (smallest to largest)``, for what differs by factors; the value alone if there is but one.

    Example:
        >>> median_and_range([0.00123, 0.1, 4.0])
        '0.1 (0.0012 to 4)'
        >>> median_and_range([0.1234])
        '0.12'
    """
    median = f"{statistics.median(values):.2g}"
    return median if len(values) == 1 else f"{median} ({min(values):.2g} to {max(values):.2g})"


def counts(values: Sequence[float]) -> str:
    """The whole numbers that occur.

    Example:
        >>> counts([20.0, 20.0])
        '20'
        >>> counts([20.0, 10.0])
        '10, 20'
    """
    return ", ".join(f"{value:.0f}" for value in sorted(set(values)))


def summarise(
    results: Sequence[Row],
    by: str,
    columns: Sequence[str],
    show: Callable[[Sequence[float]], str] = mean_and_spread,
) -> list[dict[str, str]]:
    """One row per value of ``by``: what ``show`` makes of each column (nothing, where it is not), and how many runs.

    Of the number of images that a distance is of, "n" or "<data set> n", every number is given.
    """
    rows = []
    for value in dict.fromkeys(result[by] for result in results):
        chosen = [result for result in results if result[by] == value]
        row = {by: str(value), "runs": str(len(chosen))}
        for column in columns:
            values = [float(str(result[column])) for result in chosen if column in result]
            row[column] = (counts if column.split()[-1] == "n" else show)(values) if values else ""
        rows.append(row)
    return rows


def by_seed(results: Sequence[Row], by: str, column: str) -> list[dict[str, str]]:
    """One row per value of ``by``, with the column's figure of each seed, for a reader who does not trust a mean.

    Example:
        >>> by_seed([{"method": "adam", "seed": 7, "accuracy": 97.128}], "method", "accuracy")
        [{'accuracy': 'adam', 'seed 7': '97.13'}]
    """
    seeds = sorted({int(str(result["seed"])) for result in results})
    rows = []
    for value in dict.fromkeys(result[by] for result in results):
        found = {result["seed"]: float(str(result[column])) for result in results if result[by] == value}
        shown = {f"seed {seed}": mean_and_spread([found[seed]]) if seed in found else "" for seed in seeds}
        rows.append({column: str(value), **shown})
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows, with aligned columns.

    Example:
        >>> print(markdown([{"method": "mtadam", "accuracy": "97.9"}]))
        | method | accuracy |
        | ------ | -------- |
        | mtadam | 97.9     |
    """
    header = list(rows[0])
    widths = [max(len(name), *(len(str(row[name])) for row in rows)) for name in header]
    lines = [header, ["-" * width for width in widths], *([str(row[name]) for name in header] for row in rows)]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, one line each, with the columns of all of them."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
