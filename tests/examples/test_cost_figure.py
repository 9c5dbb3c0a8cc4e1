"""The figure of quality against wall time."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from example_projects.common import report
from example_projects.common.cost_figure import draw, main, read

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
def test_a_panel_has_every_run_at_its_time_and_figure(results, logarithmic):
    axes = Figure().subplots()
    draw(axes, "accuracy", read(results, "accuracy", "adam"), logarithmic=logarithmic)
    found = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines if line.get_marker() == "o"]
    assert found == [([1.0] * 3, [80.0, 90.0, 85.0]), ([5.0], [98.0])]
    medians = [float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "_"]
    assert medians == [85.0, 98.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["adam", "mtadam"]
    assert axes.get_yscale() == ("log" if logarithmic else "linear")


def test_the_figure_has_a_panel_per_file(results, tmp_path, capsys):
    output = tmp_path / "figure.png"
    panel = ["--panel", str(results), "accuracy"]
    main([*panel, "--output", str(output)])
    one = np.array(Image.open(output))
    main([*panel, *panel, "--output", str(output)])
    two = np.array(Image.open(output))
    assert two.shape[:2] == (one.shape[0], 2 * one.shape[1])
    assert str(output) in capsys.readouterr().out
