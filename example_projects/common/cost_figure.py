"""Draw quality against wall time, a panel per results.csv of a project, a dot per run and a cross per method.

The time of a method is the median of its runs' seconds per step, relative to that of the baseline.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 520, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 34, 48
PAPER, INK, GRID = "white", "black", (220, 220, 220)
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


@dataclass(frozen=True)
class Axis:
    """Numbers to pixels, on a logarithmic or a linear scale.

    Attributes:
        low: the number at ``start``.
        high: the number at ``end``.
        start: a pixel.
        end: a pixel.
        logarithmic: whether equal factors are equal distances.
    """

    low: float
    high: float
    start: int
    end: int
    logarithmic: bool

    def place(self, value: float) -> float:
        """The pixel of a number.

        Example:
            >>> Axis(0.01, 100, 0, 400, logarithmic=True).place(1.0)
            200.0
        """
        value, low, high = (math.log10(v) if self.logarithmic else v for v in (value, self.low, self.high))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers from ``low`` to ``high``: 1, 2 and 5 of every decade, or some five at equal distances.

        Example:
            >>> Axis(0.5, 12, 0, 1, logarithmic=True).ticks()
            [0.5, 1.0, 2.0, 5.0, 10.0]
            >>> Axis(88.3, 98.6, 0, 1, logarithmic=False).ticks()
            [90.0, 92.0, 94.0, 96.0, 98.0]
        """
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            leading = (1, 2, 5) if self.high < 1000 * self.low else (1,)
            found = [float(f"{digit}e{decade}") for decade in decades for digit in leading]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = min((digit * unit for digit in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
            first = math.ceil(self.low / step)
            found = [round(index * step, 10) for index in range(first, math.floor(self.high / step) + 1)]
        return [tick for tick in found if self.low <= tick <= self.high]


def read(path: Path, column: str, baseline: str) -> dict[str, tuple[float, list[float]]]:
    """The relative time and the runs' figures of each method in a results.csv.

    Raises:
        ValueError: the file has no run of the baseline, or no such column.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if column not in rows[0]:
        raise ValueError(f"{path} has no column {column!r}. It has {list(rows[0])}.")
    if all(row["method"] != baseline for row in rows):
        raise ValueError(
            f"{path} has no run of {baseline!r}, to which times are relative. Run it with that method too."
        )
    seconds = {
        method: statistics.median(float(row["seconds_per_step"]) for row in rows if row["method"] == method)
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    return {
        method: (time / seconds[baseline], [float(row[column]) for row in rows if row["method"] == method])
        for method, time in seconds.items()
    }


def draw_panel(title: str, methods: dict[str, tuple[float, list[float]]], *, logarithmic: bool) -> Image.Image:
    """One panel: time to the right, the figure upwards."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    times = [time for time, _ in methods.values()]
    values = [value for _, found in methods.values() for value in found]
    across = Axis(0.8 * min(times), 1.7 * max(times), LEFT, WIDTH - RIGHT, logarithmic=True)
    margin = 0 if logarithmic else 0.05 * (max(values) - min(values) or 1)
    low, high = (min(values) / 1.5, max(values) * 1.5) if logarithmic else (min(values) - margin, max(values) + margin)
    up = Axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic)
    for tick in across.ticks():
        x = across.place(tick)
        draw.line((x, TOP, x, HEIGHT - BOTTOM), GRID)
        draw.text((x, HEIGHT - BOTTOM + 4), f"{tick:g}", INK, font, anchor="ma")
    for tick in up.ticks():
        y = up.place(tick)
        draw.line((LEFT, y, WIDTH - RIGHT, y), GRID)
        draw.text((LEFT - 6, y), f"{tick:g}", INK, font, anchor="rm")
    draw.rectangle((LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), outline=INK)
    draw.text((LEFT, 10), title, INK, font)
    draw.text(((LEFT + WIDTH - RIGHT) // 2, HEIGHT - 24), "time of a step, relative", INK, font, anchor="ma")
    for colour, (method, (time, found)) in zip(COLOURS * len(methods), methods.items(), strict=False):
        x, middle = across.place(time), up.place(statistics.median(found))
        for value in found:
            y = up.place(value)
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), outline=colour)
        draw.line((x - 6, middle, x + 6, middle), colour, 3)
        draw.text((x + 9, middle), method, colour, font, anchor="lm")
    return image


def beside(panels: Sequence[Image.Image]) -> Image.Image:
    """The panels in a row."""
    image = Image.new("RGB", (WIDTH * len(panels), HEIGHT), PAPER)
    for index, panel in enumerate(panels):
        image.paste(panel, (WIDTH * index, 0))
    return image


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m example_projects.common.cost_figure", description=__doc__)
    add = parser.add_argument
    add("--panel", nargs=2, action="append", required=True, metavar=("RESULTS", "COLUMN"),
        help="a results.csv and the column that is drawn; again for a further panel")  # fmt: skip
    add("--logarithmic", nargs="*", default=["relative_error"], metavar="COLUMN", help="columns on a logarithmic scale")
    add("--baseline", default="adam", help="the method whose step takes 1")
    add("--output", type=Path, required=True, help="the PNG file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    panels = [
        draw_panel(column, read(Path(path), column, options.baseline), logarithmic=column in options.logarithmic)
        for path, column in options.panel
    ]
    beside(panels).save(options.output)
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    main()
