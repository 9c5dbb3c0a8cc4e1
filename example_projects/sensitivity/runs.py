"""The file of runs: a line for each, written when it has ended."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

Run = Mapping[str, str]  # a line of the file

WHAT = ("problem", "method", "spread", "lr", "steps", "seed")
COLUMNS = (*WHAT, "value", "early", "seconds_per_step")


def key_of(run: Run) -> tuple[str, ...]:
    """What makes a run what it is."""
    return tuple(run[name] for name in WHAT)


def read_runs(file: Path) -> list[Run]:
    """The runs so far; a last line that was cut short does not count, and is taken away."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return list(csv.DictReader(whole.splitlines()))


def append(file: Path, run: Run) -> None:
    """Add a line."""
    new = not file.exists()
    with file.open("a", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(run)
