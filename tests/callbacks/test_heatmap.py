"""Heatmaps show every number, colors from the data, and say in words what the colors mean."""

import math

import numpy as np
import pytest
import torch

from lightning_mtadam.callbacks import drawing
from lightning_mtadam.callbacks.drawing import PAPER
from lightning_mtadam.callbacks.few_rows import few_rows
from lightning_mtadam.callbacks.heatmap import BLUE, MISSING, RED, WHITE, Scale, heatmap

FACTORS = Scale(below="multiplied up", above="divided down", missing="not reached", logarithmic=True)
COSINES = Scale(below="against", above="with", limit=1.0)


class Watched:
    """What is written and filled in a picture, in place of Pillow's own drawing."""

    def __init__(self, monkeypatch):
        from PIL import ImageDraw

        self.words, self.boxes, cls = [], [], ImageDraw.ImageDraw
        text, rectangle = cls.text, cls.rectangle

        def watched_text(draw, xy, words, *args, **kwargs):
            self.words.append(words)
            if draw.im.size[0] > 300:  # not a label that is to be turned
                box = draw.textbbox(xy, words, *args[1:], **kwargs)
                assert box[0] >= 0 <= box[1], f"{words} is cut"
                assert box[2] <= draw.im.size[0], f"{words} is cut"
                assert box[3] <= draw.im.size[1], f"{words} is cut"
            return text(draw, xy, words, *args, **kwargs)

        def watched_rectangle(draw, xy, fill=None, *args, **kwargs):
            self.boxes.append((xy, fill))
            return rectangle(draw, xy, fill, *args, **kwargs)

        monkeypatch.setattr(cls, "text", watched_text)
        monkeypatch.setattr(cls, "rectangle", watched_rectangle)


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def test_every_cell_has_its_number_and_a_missing_one_has_none(watched):
    table = torch.tensor([[250.0, 1.0, math.nan], [0.002, 0.5, math.inf]])
    heatmap(table, ["first", "second"], ["a", "b", "c"], FACTORS, "Title of it")
    assert {"250", "1", "0.002", "0.50", "first", "second", "a", "b", "c", "Title of it"} <= set(watched.words)
    assert not {"nan", "inf"} & set(watched.words)
    fills = [fill for _, fill in watched.boxes[:6]]
    assert fills[2] == fills[5] == MISSING
    assert fills[1] == WHITE
    assert PAPER not in fills


def test_red_is_above_the_middle_blue_below_and_the_deepest_is_the_datas_power_of_ten(watched):
    heatmap(torch.tensor([[1e3, 10.0, 1.0, 0.1, 2e-3]]), ["x"], list("abcde"), FACTORS)
    fills = np.array([fill for _, fill in watched.boxes[:5]], dtype=float)
    assert tuple(fills[0]) == RED
    reds, blues = fills[:, 0] - fills[:, 2], fills[:, 2] - fills[:, 0]
    assert reds[0] > reds[1] > reds[2] == 0 < blues[3] < blues[4]
    said = " ".join(watched.words)
    assert "red: divided down; deepest at 1000" in said
    assert "blue: multiplied up; deepest at 0.001" in said
    assert "gray" not in said, "only colors that are there are explained"


def test_a_scale_may_be_linear_about_zero_with_a_limit_of_its_own(watched):
    heatmap(torch.tensor([[1.0, -0.5], [0.0, -1.0]]), ["x", "y"], ["x", "y"], COSINES)
    fills = [fill for _, fill in watched.boxes[:4]]
    assert fills[0] == RED
    assert fills[3] == BLUE
    assert fills[2] == WHITE
    assert "blue: against; deepest at -1" in watched.words


@pytest.mark.parametrize("names", [["a", "b"], ["reconstruction_gjpqy"] * 3, [f"class_{i}" for i in range(10)]])
def test_no_word_is_cut_and_none_touches_another(watched, names):
    rows = [f"encoder.block_{index}.attention.in_proj_weight_of_a_long_name" for index in range(3)]
    image = heatmap(torch.full((3, len(names)), 1e4), rows, names, FACTORS, "A title of many words " * 6)
    assert image.mode == "RGB"
    inked = (np.asarray(image).min(-1) < 128) & (np.asarray(image)[..., 0] < 170)  # letters: neither paper nor cells
    (left, top, right, bottom), _ = watched.boxes[0]
    middles = [left - drawing.MARGIN // 2 + (right - left + 3) * index for index in range(1, len(names))]
    assert not inked[top - 30 : top - 10, middles].all(1).any(), "heads of columns run into each other"
    assert not inked[top : bottom + 1, left - 4 : left].any(), "names of rows run into the cells"


def test_a_table_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"2 rows and a column for each of 1 columns, but has shape \(1, 1\)"):
        heatmap(torch.ones(1, 1), ["x", "y"], ["a"], COSINES)


def test_a_table_without_any_value_is_drawn():
    assert heatmap(torch.full((1, 2), math.nan), ["x"], ["a", "b"], FACTORS).mode == "RGB"


def test_colors_are_told_apart_by_everyone():
    """By their lightness alone, as in grayscale, the ends differ from the middle; red and blue differ in hue."""
    lightness = [np.dot(color, (0.2126, 0.7152, 0.0722)) for color in (RED, WHITE, BLUE)]
    assert lightness[1] - max(lightness[0], lightness[2]) > 100


# Long tables


def test_a_short_table_is_left_alone():
    table = torch.rand(3, 2)
    found, rows, said = few_rows(table, ["a", "b", "c"], at_most=3)
    assert found is table
    assert rows == ["a", "b", "c"]
    assert said == ""


def test_layers_are_joined_by_their_modules_as_deep_as_there_is_room():
    rows = [f"net.{block}.{part}.weight" for block in range(5) for part in ("in", "out")] + ["head.weight"]
    table = torch.arange(11.0)[:, None] * torch.ones(2)
    table[0, 1] = math.nan
    found, names, said = few_rows(table, rows, at_most=6)
    assert names == [f"net.{block}" for block in range(5)] + ["head.weight"]
    assert found[1].tolist() == [2, 2]
    assert found[0].tolist() == [0, 1], "the median is over what there is"
    assert "median of the layers of a module, of 11" in said


def test_names_without_modules_are_joined_with_their_neighbors():
    found, names, said = few_rows(torch.arange(500.0)[:, None], [f"{index}.weight" for index in range(500)], 24)
    assert len(names) == len(found) <= 24
    assert names[0] == "0.weight to 20.weight"
    assert names[-1].endswith("499.weight")
    assert found[0].item() == 10
    assert "median of 21 neighboring layers, of 500" in said
