"""The figure of quality against wall time."""

import numpy as np
import pytest
from PIL import Image

from example_projects.common import report
from example_projects.common.cost_figure import COLOURS, HEIGHT, WIDTH, Axis, main, read

ROWS = [
    {"method": "adam", "seed": 0, "seconds_per_step": 0.2, "accuracy": 80.0},
    {"method": "adam", "seed": 1, "seconds_per_step": 0.1, "accuracy": 90.0},
    {"method": "adam", "seed": 2, "seconds_per_step": 0.9, "accuracy": 85.0},
    {"method": "mtadam", "seed": 0, "seconds_per_step": 1.0, "accuracy": 98.0},
]


@pytest.fixture
def results(tmp_path):
    report.write_csv(tmp_path / "results.csv", ROWS)
    return tmp_path / "results.csv"


def test_times_are_medians_relative_to_the_baseline(results):
    assert read(results, "accuracy", "adam") == {"adam": (1.0, [80.0, 90.0, 85.0]), "mtadam": (5.0, [98.0])}
    assert read(results, "accuracy", "mtadam")["adam"][0] == pytest.approx(0.2)


def test_a_missing_baseline_or_column_is_named(results):
    with pytest.raises(ValueError, match=r"results\.csv has no run of 'sgd'"):
        read(results, "accuracy", "sgd")
    with pytest.raises(ValueError, match=r"results\.csv has no column 'error'.*'accuracy'"):
        read(results, "error", "adam")


@pytest.mark.parametrize("logarithmic", [True, False])
def test_an_axis_goes_from_its_start_to_its_end_and_so_do_its_ticks(logarithmic):
    axis = Axis(0.003, 40, 300, 20, logarithmic)
    assert (axis.place(0.003), axis.place(40)) == (300, 20)
    places = [axis.place(tick) for tick in axis.ticks()]
    assert len(places) >= 4
    assert places == sorted(places, reverse=True)
    assert all(20 <= place <= 300 for place in places)


def test_the_figure_has_a_panel_per_file_and_every_method_in_its_colour(results, tmp_path, capsys):
    output = tmp_path / "figure.png"
    panel = ["--panel", str(results), "accuracy"]
    main([*panel, *panel, "--output", str(output)])
    pixels = np.array(Image.open(output))
    assert pixels.shape == (HEIGHT, 2 * WIDTH, 3)
    assert str(output) in capsys.readouterr().out
    left, right = pixels[:, :WIDTH], pixels[:, WIDTH:]
    np.testing.assert_array_equal(left, right)
    rows = []
    for colour in COLOURS[:2]:
        rgb = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
        found = np.argwhere((left == rgb).all(2))
        assert len(found) > 20
        rows.append((found[:, 0].mean(), found[:, 1].mean()))
    (adam_y, adam_x), (ours_y, ours_x) = rows
    assert ours_x > adam_x, "the slower method is not to the right"
    assert ours_y < adam_y, "the better method is not above"
