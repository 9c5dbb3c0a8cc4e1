"""A table as a picture: colors that diverge from a middle, the numbers in the cells, a legend in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_mtadam.callbacks import drawing
from lightning_mtadam.callbacks.drawing import LINE, MARGIN, RGB, number, shortened, widest, width_of, wrapped

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

CELL_WIDTH, CELL_HEIGHT = 68, 42
WIDEST_CELL, WIDEST_TABLE = 160, 720
"""Cells widen so far for names that are written level; with longer names, or more of them, they are upright."""
LONGEST_NAME, NARROWEST = 400, 640
SWATCH, GAP = 24, 14
BESIDE = SWATCH + GAP
BLUE, WHITE, RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)  # told apart with every color blindness
MISSING: RGB = (208, 208, 208)


@dataclass(frozen=True)
class Scale:
    """What the colors of a heatmap mean: blue below the middle, white at it, red above.

    Attributes:
        below: what blue means, in words.
        above: what red means, in words.
        missing: what a gray cell without a number means: a value that is nan or inf.
        logarithmic: the middle is 1, and colors deepen by powers of ten; else it is 0, and they deepen evenly.
        limit: the value above the middle with the deepest red. ``None``: the largest of the data, up or down.
    """

    below: str
    above: str
    missing: str = "no value"
    logarithmic: bool = False
    limit: float | None = None

    def places(self, table: Tensor) -> Tensor:
        """Where values lie between the deepest blue, -1, and the deepest red, 1; nan where there is no value."""
        shifted = self._shifted(table)
        return (shifted / self._reach(shifted)).clamp(-1, 1)

    def ends(self, table: Tensor) -> tuple[float, float]:
        """The values with the deepest blue and the deepest red."""
        reach = self._reach(self._shifted(table))
        return (10**-reach, 10**reach) if self.logarithmic else (-reach, reach)

    def _shifted(self, table: Tensor) -> Tensor:
        table = table.detach().double().cpu()
        table = torch.where(table.isfinite(), table, math.nan)
        return table.log10() if self.logarithmic else table

    def _reach(self, shifted: Tensor) -> float:
        """How far from the middle colors go on deepening."""
        if self.limit is not None:
            return math.log10(self.limit) if self.logarithmic else self.limit
        sizes = shifted[shifted.isfinite()].abs()
        largest = float(sizes.max()) if len(sizes) else 0.0
        return max(math.ceil(largest - 1e-6), 1.0) if self.logarithmic else largest or 1.0


def heatmap(table: Tensor, rows: Sequence[str], columns: Sequence[str], scale: Scale, title: str = "") -> Image:
    """Draw a table, with a number in every cell.

    Args:
        table: the values, [R, C]; nan where there is none.
        rows: R names, written to the left. For many, see :func:`~lightning_mtadam.callbacks.few_rows.few_rows`.
        columns: C names, written above the table, upright if they are long.
        scale: what the colors mean; its words are the legend.
        title: what the picture shows, in words.

    Returns:
        A picture on a paper of its own, as large as the table needs.

    Raises:
        ValueError: the table has another shape.
        ImportError: Pillow is not installed.

    Example:
        >>> scale = Scale(below="against each other", above="with each other", limit=1.0)
        >>> heatmap(torch.eye(2), ["fit", "size"], ["fit", "size"], scale, "Cosines of the terms").mode
        'RGB'
    """
    if tuple(table.shape) != (len(rows), len(columns)):
        raise ValueError(
            f"table must have a row for each of {len(rows)} rows and a column for each of {len(columns)} columns, but"
            f" has shape {tuple(table.shape)}."
        )
    rows, columns = ([shortened(name, LONGEST_NAME) for name in names] for names in (rows, columns))
    grid = _Grid.fitting(rows, columns, title)
    legend = [(color, wrapped(words, grid.text_width - BESIDE)) for color, words in _legend(scale, table)]
    height = grid.bottom + LINE * sum(len(lines) for _, lines in legend) + 2 * MARGIN
    image, draw = drawing.new_image(grid.text_width + 2 * MARGIN, height)
    drawing.write_lines(draw, (MARGIN, MARGIN), wrapped(title, grid.text_width))
    _write_names(image, rows, columns, grid)
    _draw_cells(draw, table, scale, grid)
    _draw_legend(draw, legend, grid.bottom + MARGIN)
    return image


@dataclass(frozen=True)
class _Grid:
    """Where the cells are, in pixels, and how the names of the columns are written."""

    left: int
    top: int
    cell_width: int
    shape: tuple[int, int]
    upright: bool

    @classmethod
    def fitting(cls, rows: Sequence[str], columns: Sequence[str], title: str) -> _Grid:
        longest = widest(columns)
        level = max(longest + 14, CELL_WIDTH)
        upright = level > WIDEST_CELL or level * len(columns) > WIDEST_TABLE
        left = MARGIN + widest(rows) + GAP
        grid = cls(left, 0, CELL_WIDTH if upright else level, (len(rows), len(columns)), upright)
        above = LINE * len(wrapped(title, grid.text_width)) + GAP if title else 0
        return replace(grid, top=MARGIN + above + (longest if upright else LINE) + GAP)

    @property
    def bottom(self) -> int:
        return self.top + CELL_HEIGHT * self.shape[0]

    @property
    def text_width(self) -> int:
        """Of the lines above and below the cells."""
        return max(self.left + self.cell_width * self.shape[1] + MARGIN, NARROWEST) - 2 * MARGIN

    def cell(self, row: int, column: int) -> tuple[int, int, int, int]:
        left, top = self.left + self.cell_width * column, self.top + CELL_HEIGHT * row
        return left, top, left + self.cell_width - 3, top + CELL_HEIGHT - 3


def _write_names(image: Image, rows: Sequence[str], columns: Sequence[str], grid: _Grid) -> None:
    from PIL import Image, ImageDraw

    letters, draw = drawing.font(), ImageDraw.Draw(image)
    for index, name in enumerate(rows):
        middle = grid.top + CELL_HEIGHT * index + CELL_HEIGHT // 2 - 1
        draw.text((grid.left - GAP, middle), name, drawing.INK, letters, anchor="rm")
    for index, name in enumerate(columns):
        middle = grid.left + grid.cell_width * index + grid.cell_width // 2 - 1
        if not grid.upright:
            draw.text((middle, grid.top - GAP), name, drawing.INK, letters, anchor="md")
            continue
        label = Image.new("RGB", (width_of(name), LINE), drawing.PAPER)
        ImageDraw.Draw(label).text((0, LINE // 2), name, drawing.INK, letters, anchor="lm")
        image.paste(label.rotate(90, expand=True), (middle - LINE // 2, grid.top - GAP - label.width))


def _draw_cells(draw: ImageDraw, table: Tensor, scale: Scale, grid: _Grid) -> None:
    letters = drawing.font(drawing.SMALL_LETTERS)
    for row, (places, values) in enumerate(zip(scale.places(table).tolist(), table.tolist(), strict=True)):
        for column, (place, value) in enumerate(zip(places, values, strict=True)):
            color, (left, top, right, bottom) = _color(place), grid.cell(row, column)
            draw.rectangle((left, top, right, bottom), color)
            if not math.isnan(place):
                ink = drawing.INK if sum(color) > 380 else drawing.PAPER
                draw.text(((left + right) // 2, (top + bottom) // 2), number(value), ink, letters, anchor="mm")


def _color(place: float) -> RGB:
    """The color at a place from -1 to 1."""
    if math.isnan(place):
        return MISSING
    end = RED if place > 0 else BLUE
    red, green, blue = (round(w + (e - w) * abs(place)) for w, e in zip(WHITE, end, strict=True))
    return red, green, blue


def _legend(scale: Scale, table: Tensor) -> list[tuple[RGB, str]]:
    """The colors that are seen, and what they mean."""
    places, (low, high) = scale.places(table), scale.ends(table)
    said = [
        (RED, f"red: {scale.above}; deepest at {number(high)}", places > 0),
        (BLUE, f"blue: {scale.below}; deepest at {number(low)}", places < 0),
        (MISSING, f"gray: {scale.missing}", places.isnan()),
    ]
    return [(color, words) for color, words, seen in said if seen.any()]


def _draw_legend(draw: ImageDraw, legend: Sequence[tuple[RGB, list[str]]], top: int) -> None:
    for color, lines in legend:
        draw.rectangle((MARGIN, top + 4, MARGIN + SWATCH - 1, top + 3 + SWATCH), color, drawing.FAINT)
        drawing.write_lines(draw, (MARGIN + BESIDE, top), lines)
        top += LINE * len(lines)
