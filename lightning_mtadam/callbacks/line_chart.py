"""Series over the steps as a picture: one logarithmic axis of factors, a color a series, its name at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from lightning_mtadam.callbacks import drawing
from lightning_mtadam.callbacks.axes import factor, factor_ticks, spread, step_ticks
from lightning_mtadam.callbacks.drawing import LINE, MARGIN, RGB, number, shortened, widest, wrapped

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

COLORS: tuple[RGB, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (50, 166, 137),
    (90, 17, 115),
    (140, 121, 63),
    (166, 50, 79),
    (30, 30, 30),
    (33, 33, 217),
)
"""Told apart with every color blindness, and 3 to 1 at least against the paper; lines after these are hollow."""
WIDTH, PLOT_HEIGHT = 800, 340
LONGEST_NAME, LEADER = 220, 44
SMOOTHING = 2
"""Lines are drawn so many times larger, and made small."""

Point = tuple[float, float]


def line_chart(steps: Sequence[int], series: Mapping[str, Sequence[float]], title: str, legend: Sequence[str]) -> Image:
    """Draw factors over the steps.

    Args:
        steps: where the values are, ascending: [N].
        series: N values by name; nan, inf and what is not above zero is a gap.
        title: what the picture shows, in words.
        legend: what is to be known to read it, a sentence each.

    Returns:
        A picture on a paper of its own. All values are within, however far one lies from the others.

    Raises:
        ImportError: Pillow is not installed.

    Example:
        >>> line_chart([0, 10], {"fit": [1.0, 1.0], "size": [2.0, 300.0]}, "Balance", []).mode
        'RGB'
    """
    lines = {name: _logarithms(values) for name, values in series.items()}
    ends = [_end(name, values) for name, values in series.items()]
    above = wrapped(title, WIDTH - 2 * MARGIN)
    below = [line for sentence in legend for line in wrapped(sentence, WIDTH - 2 * MARGIN)]
    plot = _Plot.fitting(steps, lines, ends, MARGIN + LINE * len(above) + LINE // 2)
    image, draw = drawing.new_image(WIDTH, plot.bottom + LINE * (len(below) + 2) + MARGIN)
    drawing.write_lines(draw, (MARGIN, MARGIN), above)
    _draw_axes(draw, plot)
    _draw_lines(image, plot, steps, list(lines.values()))
    points = [[point for piece in _pieces(steps, values) for point in piece] for values in lines.values()]
    _write_ends(draw, plot, points, ends)
    drawing.write_lines(draw, (MARGIN, plot.bottom + 2 * LINE), below)
    return image


def color_of(index: int) -> RGB:
    """The color of a series."""
    return COLORS[index % len(COLORS)]


@dataclass(frozen=True)
class _Plot:
    """Where values lie on the sheet, in pixels."""

    left: int
    top: int
    right: int
    bottom: int
    steps: tuple[float, float]
    logs: tuple[float, float]

    @classmethod
    def fitting(
        cls, steps: Sequence[int], lines: Mapping[str, Sequence[float]], ends: Sequence[str], top: int
    ) -> _Plot:
        found = [value for values in lines.values() for value in values if not math.isnan(value)]
        low, high = min([*found, 0.0]), max([*found, 0.0])  # 1 is always seen
        air = max(0.04 * (high - low), 0.06)
        logs = low - air, high + air
        left = MARGIN + widest([factor(tick) for tick in factor_ticks(*logs)]) + 12
        right = WIDTH - MARGIN - widest(ends) - LEADER
        bottom = top + max(PLOT_HEIGHT, LINE * len(ends))
        first, last = (steps[0] if len(steps) > 1 else 0, steps[-1]) if steps else (0, 1)
        return cls(left, top, right, bottom, (first, max(last, first + 1)), logs)

    def x(self, step: float) -> float:
        first, last = self.steps
        return self.left + (self.right - self.left) * (step - first) / (last - first)

    def y(self, log: float) -> float:
        low, high = self.logs
        return self.bottom - (self.bottom - self.top) * (log - low) / (high - low)


def _logarithms(values: Sequence[float]) -> list[float]:
    return [math.log10(value) if 0 < value < math.inf else math.nan for value in values]


def _end(name: str, values: Sequence[float]) -> str:
    """What stands at the end of a line: its name, and its last value."""
    found = [value for value in values if 0 < value < math.inf]
    return f"{shortened(name, LONGEST_NAME)} {number(found[-1])}x" if found else f"{shortened(name, LONGEST_NAME)} -"


def _draw_axes(draw: ImageDraw, plot: _Plot) -> None:
    letters = drawing.font()
    for tick in factor_ticks(*plot.logs):
        y = plot.y(math.log10(tick))
        draw.line((plot.left, y, plot.right, y), drawing.FAINT if tick == 1 else drawing.RULED, 3 if tick == 1 else 2)
        draw.text((plot.left - 10, y), factor(tick), drawing.INK, letters, anchor="rm")
    for step in step_ticks(*plot.steps):
        x = plot.x(step)
        draw.line((x, plot.top, x, plot.bottom + 6), drawing.RULED, 2)
        draw.text((x, plot.bottom + 10), f"{step:,}", drawing.INK, letters, anchor="ma")
    draw.text((plot.right + LEADER, plot.bottom + 10), "step", drawing.FAINT, letters, anchor="la")


def _draw_lines(image: Image, plot: _Plot, steps: Sequence[int], lines: Sequence[Sequence[float]]) -> None:
    """Draw the lines smoothly: large, over a copy of what is there, and made small."""
    from PIL import ImageDraw
    from PIL.Image import Resampling

    box = (plot.left - 8, plot.top - 8, plot.right + 8, plot.bottom + 8)
    part = image.crop(box).resize(((box[2] - box[0]) * SMOOTHING, (box[3] - box[1]) * SMOOTHING), Resampling.NEAREST)
    draw = ImageDraw.Draw(part)
    for index, logs in enumerate(lines):
        for piece in _pieces(steps, logs):
            places = [((plot.x(x) - box[0]) * SMOOTHING, (plot.y(y) - box[1]) * SMOOTHING) for x, y in piece]
            _draw_line(draw, places, index)
    image.paste(part.reduce(SMOOTHING), box[:2])


def _pieces(steps: Sequence[int], logs: Sequence[float]) -> list[list[Point]]:
    """The parts of a line between its gaps."""
    found = groupby(zip(steps, logs, strict=True), key=lambda point: math.isnan(point[1]))
    return [list(piece) for is_gap, piece in found if not is_gap]


def _draw_line(draw: ImageDraw, places: Sequence[Point], index: int) -> None:
    radius = 3 * SMOOTHING
    for x, y in (places[0], places[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), color_of(index))
    draw.line(places, color_of(index), 5 * SMOOTHING)
    if index >= len(COLORS):
        draw.line(places, drawing.PAPER, 2 * SMOOTHING)


def _write_ends(draw: ImageDraw, plot: _Plot, pieces: Sequence[Sequence[Point]], ends: Sequence[str]) -> None:
    """Write what stands at the lines' ends, and lead there from the last point of each."""
    lasts = [points[-1] if points else (plot.steps[1], plot.logs[0]) for points in pieces]
    places = spread([plot.y(log) for _, log in lasts], LINE, plot.top, plot.bottom - LINE // 2)
    for index, ((step, log), place, end) in enumerate(zip(lasts, places, ends, strict=True)):
        leader = [(plot.x(step), plot.y(log)), (plot.right + 6, plot.y(log)), (plot.right + LEADER - 8, place)]
        if pieces[index]:
            draw.line(leader, color_of(index), 2)
        draw.text((plot.right + LEADER, place), end, drawing.INK, drawing.font(), anchor="lm")
