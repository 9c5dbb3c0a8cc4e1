"""A file of many small runs: a line for each, written when it has ended."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

Run = Mapping[str, str]  # a line of the file


def read_runs(file: Path) -> list[Run]:
    """The runs so far; a last line that was cut short does not count, and is taken away."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return list(csv.DictReader(whole.splitlines()))


def append_run(file: Path, run: Run) -> None:
    """Add a line; its names are the columns' in a new file."""
    new = not file.exists()
    with file.open("a", newline="") as opened:
        writer = csv.DictWriter(opened, list(run))
        if new:
            writer.writeheader()
        writer.writerow(run)
