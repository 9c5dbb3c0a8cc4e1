"""A sheet of samples: what each method made of the same images, with labels that can be read."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from example_projects.common.images import CELL, alike, middle, read_image, tiled

MOST = 4  # images beside each other, so that each is large enough to be compared
FONT_SIZE, LABEL = 16, 26  # of a label, and how many characters a line of it has


def draw_samples(finals: Mapping[str, Path], path: Path) -> None:
    """Draw for each sample the input, what each method made of it, and the truth; of large images the middle.

    Args:
        finals: per method the folder with the images of a run.
        path: of the PNG file.
    """
    folders = list(finals.values())
    count = min(len(list(folder.glob("*_input.png"))) for folder in folders)
    labels = ["input", *finals, "truth"]
    columns = columns_for(len(labels))
    rows = []
    for index in range(count):
        outputs = [read_image(folder / f"{index}_output.png") for folder in folders]
        input_, truth = (read_image(folders[0] / f"{index}_{kind}.png") for kind in ("input", "truth"))
        shown = [middle(image) for image in alike([input_, *outputs, truth], CELL)]
        cells = [labelled(image, label) for image, label in zip(shown, labels, strict=True)]
        rows += [cells[start : start + columns] for start in range(0, len(cells), columns)]
    tiled(rows).save(path)


def columns_for(count: int) -> int:
    """How many images stand beside each other, so that as few places as possible stay empty.

    Example:
        >>> [columns_for(count) for count in (3, 4, 5, 7, 9)]
        [3, 4, 3, 4, 3]
    """
    lines = -(-count // MOST)
    return -(-count // lines)


def labelled(image: Image.Image, label: str) -> Image.Image:
    """The image with its label above it, which has room for two lines."""
    header = 2 * (FONT_SIZE + 4)
    cell = Image.new("RGB", (max(image.width, CELL), header + image.height), "white")
    cell.paste(image, (0, header))
    lines = textwrap.wrap(label, LABEL)[:2]
    position = (2, header - len(lines) * (FONT_SIZE + 4))
    ImageDraw.Draw(cell).multiline_text(position, "\n".join(lines), "black", ImageFont.load_default(FONT_SIZE))
    return cell
