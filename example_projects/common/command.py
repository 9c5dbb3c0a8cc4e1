"""What the commands of all projects do alike: options, mistakes in one line, time limits, and tables."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from example_projects.common import report
from example_projects.common.disk import make_folder
from example_projects.common.saving import NotEndedError
from example_projects.common.values import rate

NOT_ENDED, INTERRUPTED = 75, 130  # exit statuses: "try again", of sysexits.h, and a shell's of Ctrl-C
MISTAKES = (ValueError, OSError, ImportError, MisconfigurationException)  # what a user can mend

REMEDIES = {  # for what Lightning says, by a part of it
    "No supported gpu backend": "Give --accelerator cpu.",
    "accelerator is not available": "Give --accelerator cpu.",
}

UNREMARKABLE = (
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
    ".*LeafSpec.*",
    ".*smaller than the logging interval.*",
    ".*your dataloader is not resumable.*",  # EpochSampler is
)


def run_command(main: Callable[[], object]) -> None:
    """Run a command. What a user can mend is told in one line, with exit status 1.

    ``python -X dev`` shows where it was. When time is up the exit status is 75: the same command is to be given again.
    """
    try:
        main()
    except NotEndedError as stopped:
        print(f"Time is up: {stopped}. The same command goes on from here.")
        sys.exit(NOT_ENDED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except MISTAKES as error:
        if sys.flags.dev_mode:
            raise
        said = " ".join(str(error).split())
        remedy = next((f" {remedy}" for part, remedy in REMEDIES.items() if part in said), "")
        sys.exit(f"error: {said}{remedy}")


def add_time_limit(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-minutes`` to a parser or a group; its ``options.stop_at`` is for :func:`goes_on` and ``runs.run``."""
    parser.add_argument("--max-minutes", dest="stop_at", type=_from_now, metavar="MINUTES",
        help="stop then, with exit status 75: the same command goes on where it stopped; implies --resume")  # fmt: skip


def _from_now(minutes: str) -> float:
    return time.time() + 60 * rate(minutes)


def goes_on(options: argparse.Namespace) -> bool:
    """Whether what was done before is continued."""
    return options.resume or options.stop_at is not None


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


def write_rows(
    options: argparse.Namespace, rows: Sequence[report.Row], results: Sequence[report.Row], notes: str = ""
) -> str:
    """Write a table as Markdown and CSV, with the options and the results of all runs, to ``options.output_dir``.

    Args:
        options: of the command.
        rows: of the table.
        results: of all runs.
        notes: what the table's reader must know, below it.

    Returns:
        The table and the notes, as Markdown.
    """
    table = "\n\n".join(part for part in (report.markdown(rows), notes) if part)
    make_folder(options.output_dir)
    (options.output_dir / "table.md").write_text(table + "\n")
    report.write_csv(options.output_dir / "table.csv", rows)
    (options.output_dir / "options.json").write_text(json.dumps(vars(options), default=str, indent=2))
    report.write_csv(options.output_dir / "results.csv", results)
    return table
