"""Line charts show every value on one axis, and say at each line's end which it is."""

import itertools
import math

import numpy as np
import pytest

from lightning_mtadam.callbacks import drawing, line_chart
from lightning_mtadam.callbacks.drawing import PAPER
from lightning_mtadam.callbacks.line_chart import COLORS, WIDTH
from tests.callbacks.test_heatmap import Watched

STEPS = list(range(0, 500, 10))


def series(count):
    return {f"class_{index}": [10 ** (0.002 * index * step / 10) for step in STEPS] for index in range(count)}


def places_of(image, color):
    """The pixels of a color: rows, columns."""
    return np.nonzero((np.asarray(image) == np.array(color)).all(-1))


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def test_every_line_has_its_color_its_name_and_its_last_value(watched):
    lines = {"fit": [1.0] * 50, "kl": [0.002] * 50, "gan": [30.0] * 50}
    image = line_chart.line_chart(STEPS, lines, "Title", ["Above 1x: divided down."])
    assert {"fit 1x", "kl 0.002x", "gan 30x", "Title", "Above 1x: divided down."} <= set(watched.words)
    assert {"0.01x", "1x", "10x"} <= set(watched.words), "the axis says factors"
    assert {"100", "400", "step"} <= set(watched.words)
    heights = [np.median(places_of(image, COLORS[index])[0]) for index in range(3)]
    assert heights[2] < heights[0] < heights[1], "large is above"
    for color in COLORS[:3]:
        assert len(places_of(image, color)[0]) > 300


def test_an_outlier_is_within_the_picture_at_its_place(watched):
    values = [1.0] * 50
    values[25] = 1e5
    image = line_chart.line_chart(STEPS, {"fit": values}, "", [])
    rows, columns = places_of(image, COLORS[0])
    top = rows.argmin()
    assert "1e4x" in watched.words
    assert rows.max() - rows.min() > 250
    first, last = columns.min(), columns[rows > rows.max() - 3].max()
    assert columns[top] == pytest.approx((first + last) / 2, abs=0.15 * WIDTH), "halfway along"


@pytest.mark.parametrize("count", [1, 2, 10, 17])
def test_names_at_the_ends_do_not_overlap_however_near_the_lines_are(monkeypatch, count):
    from PIL import ImageDraw

    boxes, text = [], ImageDraw.ImageDraw.text

    def watch(draw, xy, words, *args, **kwargs):
        if str(words).startswith("class_") or words == "step":
            boxes.append(draw.textbbox(xy, words, *args[1:], **kwargs))
        return text(draw, xy, words, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", watch)
    same = {name: [1.0] * len(STEPS) for name in series(count)}
    image = line_chart.line_chart(STEPS, same, "", [])
    assert len(boxes) == count + 1
    for one, other in itertools.combinations(boxes, 2):
        assert one[3] <= other[1] or other[3] <= one[1], "one over another"
    assert all(min(box) >= 0 and box[2] <= WIDTH and box[3] <= image.height for box in boxes)


def test_a_gap_is_left_open_and_a_lone_value_is_a_dot():
    values = [1.0] * 20 + [math.nan] * 20 + [1.0] * 10
    lone = [math.nan] * 30 + [5.0] + [math.nan] * 19
    image = line_chart.line_chart(STEPS, {"fit": values, "late": lone}, "", [])
    _, columns = places_of(image, COLORS[0])
    inside = np.unique(columns[columns < columns.max() - 60])
    assert np.diff(inside).max() > 0.2 * WIDTH
    assert len(places_of(image, COLORS[1])[0]) > 10


@pytest.mark.parametrize("steps", [[], [0], [100]])
def test_few_values_are_drawn_too(steps):
    lines = {"fit": [1.0] * len(steps), "never": [math.nan] * len(steps), "zero": [0.0] * len(steps)}
    assert line_chart.line_chart(steps, lines, "", []).width == WIDTH


def linear(color):
    rgb = np.array(color) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def test_colors_stand_out_from_the_paper():
    """By the contrast of the Web Content Accessibility Guidelines: 3 to 1 for graphics."""
    luminance = lambda color: float(linear(color) @ (0.2126, 0.7152, 0.0722))  # noqa: E731
    for color in COLORS:
        assert (luminance(PAPER) + 0.05) / (luminance(color) + 0.05) >= 3, color
    for ink in (drawing.INK, drawing.FAINT):
        assert (luminance(PAPER) + 0.05) / (luminance(ink) + 0.05) >= 4.5, "text"


SIGHT = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Machado, Oliveira and Fernandes 2009, at full severity, on linear RGB."""


def lab(rgb):
    """CIELAB of linear RGB, under D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1)
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz / (0.9505, 1.0, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_colors_are_told_apart_by_everyone(sight):
    seen = [lab(np.array(SIGHT[sight]) @ linear(color)) for color in COLORS]
    apart = {(a, b): float(np.linalg.norm(seen[a] - seen[b])) for a, b in itertools.combinations(range(len(COLORS)), 2)}
    worst = min(apart, key=apart.__getitem__)
    assert apart[worst] > 15, (worst, apart[worst])
