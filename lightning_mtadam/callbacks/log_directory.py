"""The pictures of a balance from what ``BalanceWeightMonitor`` logged: TensorBoard's event files, or a CSV file."""

from __future__ import annotations

import csv
import math
import re
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mtadam.callbacks import tags
from lightning_mtadam.callbacks.balance_pictures import terms_over_steps
from lightning_mtadam.callbacks.history import History

if TYPE_CHECKING:
    from PIL.Image import Image

Points = dict[int, dict[str, float]]
"""Values by tag, by step."""
EVENTS, TABLE = "events.out.tfevents.*", "metrics.csv"
LOGGED = re.compile(rf"(?:.*-)?({tags.WEIGHT}[^/]*|{tags.TERM_WEIGHT})/(.+?)(?:\.median)?")
"""A median's tag, after what a logger may put before it: its prefix and its term."""


def pictures_of(directory: Path) -> list[Image]:
    """The terms over the steps, and the last heatmap if TensorBoard logged one, of every optimizer.

    Raises:
        FileNotFoundError: there is no such directory, or no log in it.
        ValueError: there are several runs in it, or no balance was logged.
        ImportError: event files, and no tensorboard to read them.
    """
    run = _run_in(directory)
    points, heatmaps = _events(run) if any(run.glob(EVENTS)) else (_table(run / TABLE), {})
    found: list[Image] = []
    for prefix, history in _histories(points).items():
        found.append(terms_over_steps(prefix, history))
        found += [picture for tag, picture in heatmaps.items() if tag.endswith(tags.layers_by_terms(prefix))]
    if not found:
        raise ValueError(f"No balance was logged to {run}. Train with Trainer(callbacks=[BalanceWeightMonitor()]).")
    return found


def _run_in(directory: Path) -> Path:
    """The one folder with logs: event files before CSV."""
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no directory {directory}. Give the log directory of a logger.")
    for pattern in (EVENTS, TABLE):
        runs = sorted({file.parent for file in directory.rglob(pattern)})
        if directory in runs:
            return directory
        if len(runs) > 1:
            names = [str(run) for run in runs]
            raise ValueError(f"{directory} holds {len(runs)} runs. Give the directory of one of them: {names}.")
        if runs:
            return runs[0]
    raise FileNotFoundError(
        f"{directory} holds no event file of TensorBoard and no {TABLE}. Give the log directory of a TensorBoardLogger"
        " or a CSVLogger: logger.log_dir."
    )


def _events(run: Path) -> tuple[Points, dict[str, Image]]:
    """The scalars of a run, and the last picture of each tag."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"{run} holds event files, which tensorboard reads: pip install tensorboard. Without it, give the directory"
            " of a CSVLogger, the optimizer or the Trainer."
        ) from error
    from PIL import Image

    events = EventAccumulator(str(run), {"scalars": 0, "images": 1}).Reload()
    points: Points = {}
    for tag in filter(LOGGED.fullmatch, events.Tags()["scalars"]):
        for point in events.Scalars(tag):
            points.setdefault(point.step, {})[tag] = point.value
    last = {tag: events.Images(tag)[-1].encoded_image_string for tag in events.Tags()["images"]}
    return points, {tag: Image.open(BytesIO(data)).convert("RGB") for tag, data in last.items()}


def _table(file: Path) -> Points:
    """The scalars of a CSV file."""
    points: Points = {}
    with file.open(newline="") as opened:
        for row in csv.DictReader(opened):
            values = {tag: float(value) for tag, value in row.items() if value and LOGGED.fullmatch(tag)}
            if values:
                points.setdefault(int(row["step"]), {}).update(values)
    return points


def _histories(points: Points) -> dict[str, History]:
    """What was logged over the steps, by prefix."""
    found: dict[str, History] = {}
    for step in sorted(points):
        values: dict[str, dict[str, float]] = {}
        for tag, value in points[step].items():
            if (match := LOGGED.fullmatch(tag)) and not math.isnan(value):
                values.setdefault(match[1], {})[match[2]] = value
        for prefix, one in values.items():
            found.setdefault(prefix, History()).add(step, one)
    return found
