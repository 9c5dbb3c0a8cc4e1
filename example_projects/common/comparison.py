"""The report of a comparison: its table, the curves of all runs, and samples of all methods beside each other."""

from __future__ import annotations

import argparse
import csv
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from example_projects.common import report
from example_projects.common.command import write_rows
from example_projects.common.curves import draw_curves
from example_projects.common.full_size import note_on, numbers_for
from example_projects.common.image_command import columns_of, reservation
from example_projects.common.image_project import ImageProject
from example_projects.common.images import GAP, grid, read_image, to_tensor
from example_projects.common.runs import Result

Numbers = Mapping[str, Mapping[str, float]]  # by method and column

LABEL, FONT_SIZE = 18, 11  # characters in a line of a label, and its size
NARROWEST = 120  # pixels of an image, so that there is room for a label


def write_comparison(project: ImageProject, options: argparse.Namespace, results: Sequence[Result]) -> str:
    """Write ``comparison.md`` with its table, ``curves.png`` and ``samples.png`` to ``options.output_dir``.

    Runs that were only measured at their end have no curves.

    Args:
        project: what was trained.
        options: of its command.
        results: of its runs, in the order of the table.

    Returns:
        The table, as Markdown.
    """
    folder = options.output_dir
    paper = numbers_for(project, options)
    rows = report.summarise(results, "method", columns_of(project, results))
    table = write_rows(options, beside(rows, paper, "paper, full size"), results)
    trained = [result for result in results if "folder" in result]
    curves = {f"{run['method']}, seed {run['seed']}": read_curve(folder / run["folder"]) for run in trained}
    measured = {label: curve for label, curve in curves.items() if curve}
    if measured:
        draw_curves(measured, folder / "curves.png")
    first = {run["method"]: folder / run["folder"] / "final" for run in reversed(trained)}
    draw_samples(dict(reversed(first.items())), folder / "samples.png")
    said = note_on(project, options, paper)
    notes = f"Mean +- standard deviation over the runs. {said} {reservation(options)}".rstrip()
    (folder / "comparison.md").write_text(
        f"# {project.name}, {options.setting}\n\n{table}\n\n{notes}\n\n"
        + ("![Metrics of the hold-out set by epoch](curves.png)\n\n" if measured else "")
        + f"![Input, what each method made of it with seed {options.seeds[0]}, and the truth](samples.png)\n"
    )
    return table


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


def draw_samples(finals: Mapping[str, Path], path: Path) -> None:
    """Draw a row per sample: the input, what each method made of it, the truth; of large images the middle.

    Args:
        finals: per method the folder with the images of a run.
        path: of the PNG file.
    """
    folders = list(finals.values())
    count = min(len(list(folder.glob("*_input.png"))) for folder in folders)

    def image(folder: Path, index: int, kind: str) -> Tensor:
        return to_tensor(read_image(folder / f"{index}_{kind}.png"))

    rows = [
        [
            image(folders[0], index, "input"),
            *(image(folder, index, "output") for folder in folders),
            image(folders[0], index, "truth"),
        ]
        for index in range(count)
    ]
    sheet = Image.fromarray(grid(rows, NARROWEST).permute(1, 2, 0).numpy())
    label_columns(sheet, ["input", *finals, "truth"]).save(path)


def label_columns(sheet: Image.Image, labels: Sequence[str]) -> Image.Image:
    """Write the labels above the columns of a grid."""
    font = ImageFont.load_default(FONT_SIZE)
    texts = ["\n".join(textwrap.wrap(label, LABEL)) for label in labels]
    header = max(text.count("\n") + 1 for text in texts) * (FONT_SIZE + 4) + 4
    labelled = Image.new("RGB", (sheet.width, header + sheet.height), "white")
    labelled.paste(sheet, (0, header))
    draw = ImageDraw.Draw(labelled)
    for column, text in enumerate(texts):
        draw.multiline_text((column * (sheet.width + GAP) // len(texts) + 2, 2), text, "black", font)
    return labelled
