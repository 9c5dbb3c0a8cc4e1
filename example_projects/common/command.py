"""What the commands of all projects do alike: keep quiet, and write their tables."""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from collections.abc import Callable, Sequence

from example_projects.common import report

UNREMARKABLE = (
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
    ".*LeafSpec.*",
    ".*smaller than the logging interval.*",
    ".*your dataloader is not resumable.*",  # EpochSampler is
)


def at_least(lowest: int) -> Callable[[str], int]:
    """Reads the number of an option that must not be lower.

    Example:
        >>> at_least(0)("3")
        3
    """

    def whole_number(text: str) -> int:
        number = int(text)
        if number < lowest:
            raise argparse.ArgumentTypeError(f"must be {lowest} or more, but is {number}")
        return number

    return whole_number


positive = at_least(1)


def rate(text: str) -> float:
    """The number of an option that must be more than 0, and finite.

    Raises:
        argparse.ArgumentTypeError: it is not.

    Example:
        >>> rate("1e-3")
        0.001
    """
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0, but is {text}")
    return number


def keep_quiet() -> None:
    """Silence what Lightning says of every run, and of none in particular."""
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in UNREMARKABLE:
        warnings.filterwarnings("ignore", message=message)


def write_tables(
    options: argparse.Namespace,
    results: Sequence[report.Row],
    columns: Sequence[str],
    show: Callable[[Sequence[float]], str] = report.mean_and_spread,
) -> str:
    """Write the table by method as Markdown and CSV, with the runs it summarises, to ``options.output_dir``.

    Returns:
        The table, as Markdown.
    """
    return write_rows(options, report.summarise(results, "method", columns, show), results)


def write_rows(options: argparse.Namespace, rows: Sequence[report.Row], results: Sequence[report.Row]) -> str:
    """Write a table as Markdown and CSV, with the options and the results of all runs, to ``options.output_dir``.

    Returns:
        The table, as Markdown.
    """
    table = report.markdown(rows)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "table.md").write_text(table + "\n")
    report.write_csv(options.output_dir / "table.csv", rows)
    (options.output_dir / "options.json").write_text(json.dumps(vars(options), default=str, indent=2))
    report.write_csv(options.output_dir / "results.csv", results)
    return table
