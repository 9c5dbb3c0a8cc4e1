"""What TensorBoard shows beyond scalars: a heatmap of the balance and a layout of charts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

CELL = 18
LABEL_HEIGHT = 16
FONT_SIZE = 12
PAPER, INK = (225, 225, 225), "black"
COLOURS = ((33.0, 102.0, 172.0), (247.0, 247.0, 247.0), (178.0, 24.0, 43.0))
LOW, MIDDLE, HIGH = (torch.tensor(rgb, device="cpu") for rgb in COLOURS)
TERM_WEIGHT = "term_weight"
UNREACHED = torch.tensor((90.0, 90.0, 90.0), device="cpu")


def writers(loggers: Sequence[Logger]) -> Iterator[Any]:
    """The TensorBoard writers behind the loggers, whatever the loggers' classes."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # tensorboard is not installed, so no logger writes with it
        return
    for logger in loggers:
        if isinstance(writer := getattr(logger, "experiment", None), SummaryWriter):
            yield writer


def add_layout(writer: Any, terms_of: Mapping[str, Sequence[str]], *, weighted: bool) -> None:
    """Lay out one chart per term: the median over the layers between the 10th and the 90th percentile.

    Args:
        writer: TensorBoard's. It keeps one layout, the last.
        terms_of: the terms of every optimizer, by the first part of its tags.
        weighted: whether there are weights that differ by term only; they share a chart.
    """
    names = ("median", "p10", "p90")
    charts = {
        prefix: {term: ["Margin", [f"{prefix}/{term}.{name}" for name in names]] for term in reversed(terms)}
        for prefix, terms in terms_of.items()
    }
    if weighted:
        charts[TERM_WEIGHT] = {"all terms": ["Multiline", [f"{TERM_WEIGHT}/.+"]]}
    writer.add_custom_scalars(charts)


def add_heatmap(
    writer: Any, prefix: str, terms: Sequence[str], layers: Sequence[str], table: Tensor, step: int
) -> None:
    """Write the balance weights [L, I] as an image: a row per layer, a column per term."""
    writer.add_image(f"{prefix}/layers_by_terms", draw_heatmap(terms, layers, table), step, dataformats="HWC")


def add_matrix(writer: Any, tag: str, columns: Sequence[str], rows: Sequence[str], table: Tensor, step: int) -> None:
    """Write cosines or shares, -1 to 1, as an image."""
    writer.add_image(tag, draw_heatmap(columns, rows, table, linear=True), step, dataformats="HWC")


def draw_heatmap(terms: Sequence[str], layers: Sequence[str], table: Tensor, *, linear: bool = False) -> Tensor:
    """Draw balance weights [L, I] on a logarithmic scale, labelled: uint8 [height, width, 3].

    White is one, red more, blue less; the scale ends at the next power of ten. Dark grey: the term never reached the
    layer. ``linear``: numbers from -1, blue, by 0, white, to 1, red.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    left = max(int(font.getlength(name)) for name in layers) + 8
    top = max(int(font.getlength(name)) for name in terms) + 8
    decades = 1 if linear else _decades(table)
    table = 10 ** table.double().clamp(-1, 1) if linear else table
    cells = _colours(table, decades).repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
    footer = f"white: 1   red: to 1e{decades}   blue: to 1e-{decades}   dark: not reached"
    footer = "red: 1   white: 0   blue: -1   dark: no gradient" if linear else footer
    width = max(left + cells.shape[1], int(font.getlength(footer)) + 8)
    image = Image.new("RGB", (width, top + cells.shape[0] + LABEL_HEIGHT + 4), PAPER)
    image.paste(Image.fromarray(cells.numpy()), (left, top))
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(layers):
        draw.text((4, top + row * CELL + (CELL - LABEL_HEIGHT) // 2), name, INK, font)
    for column, name in enumerate(terms):
        label = Image.new("RGB", (top - 4, LABEL_HEIGHT), PAPER)
        ImageDraw.Draw(label).text((0, 0), name, INK, font)
        image.paste(label.rotate(90, expand=True), (left + column * CELL + (CELL - LABEL_HEIGHT) // 2, 0))
    draw.text((4, image.height - LABEL_HEIGHT - 2), footer, INK, font)
    return torch.from_numpy(np.array(image))


def _decades(table: Tensor) -> int:
    """How many powers of ten from one the weights go, at least one."""
    logs = table[table.isfinite() & (table > 0)].double().log10().abs()
    return max(1, math.ceil(logs.max().item())) if len(logs) else 1


def _colours(table: Tensor, decades: int) -> Tensor:
    """[L, I] -> uint8 [L, I, 3]."""
    place = (table.double().log10() / decades).clamp(-1, 1)[..., None]
    colours = torch.where(place > 0, MIDDLE + (HIGH - MIDDLE) * place, MIDDLE + (MIDDLE - LOW) * place)
    return torch.where(place.isnan(), UNREACHED, colours).to(torch.uint8)
