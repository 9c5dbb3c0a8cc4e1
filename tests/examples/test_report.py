"""Tables of results."""

import math
from pathlib import Path

import numpy as np

from example_projects.common import report
from tests.examples.running import read_rows


def test_mean_and_spread_are_those_of_numpy():
    values = [97.12, 98.34, 96.5, 99.01]
    assert report.mean_and_spread(values) == f"{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}"
    assert report.mean_and_spread([97.128]) == "97.13"


def test_small_values_have_four_digits():
    assert report.mean_and_spread([0.0123, 0.0125]) == "0.0124 +- 0.0001"
    assert report.mean_and_spread([0.01239]) == "0.0124"


def test_thousands_have_no_digits_after_the_point():
    assert report.mean_and_spread([3811.6, 3822.0]) == "3817 +- 7"
    assert report.mean_and_spread([math.nan]) == "nan"


def test_a_summary_has_a_row_per_value_in_the_order_of_appearance():
    results = [
        {"method": "b", "seed": 0, "accuracy": 90.0, "loss": 1},
        {"method": "a", "seed": 0, "accuracy": 80.0, "loss": 5},
        {"method": "b", "seed": 1, "accuracy": 92.0, "loss": 3},
    ]
    assert report.summarise(results, "method", ["accuracy", "loss"]) == [
        {"method": "b", "runs": "2", "accuracy": "91.00 +- 1.41", "loss": "2.00 +- 1.41"},
        {"method": "a", "runs": "1", "accuracy": "80.00", "loss": "5.00"},
    ]


def test_numbers_of_images_are_whole_also_of_one_set_of_several():
    results = [{"method": "a", "n": 20.0, "set14 n": 14.0, "set14 FID": 60.0}] * 2
    (row,) = report.summarise(results, "method", ["n", "set14 n", "set14 FID"])
    assert (row["n"], row["set14 n"], row["set14 FID"]) == ("20", "14", "60.00 +- 0.00")


def test_a_table_by_seed_has_every_figure_and_leaves_out_what_was_not_run():
    results = [{"method": "b", "seed": 3, "accuracy": 97.0}, {"method": "a", "seed": 3, "accuracy": 91.5},
               {"method": "b", "seed": 1, "accuracy": 0.5}]  # fmt: skip
    assert report.by_seed(results, "method", "accuracy") == [
        {"accuracy": "b", "seed 1": "0.500", "seed 3": "97.00"},
        {"accuracy": "a", "seed 1": "", "seed 3": "91.50"},
    ]


def test_a_summary_of_medians_has_the_smallest_and_the_largest():
    results = [{"method": "a", "error": value} for value in (0.004, 0.1, 0.0012)]
    assert report.summarise(results, "method", ["error"], report.median_and_range) == [
        {"method": "a", "runs": "3", "error": "0.004 (0.0012 to 0.1)"}
    ]
    assert math.isclose(float(report.median_and_range([0.5])), 0.5)


def test_a_markdown_table_has_aligned_columns_and_every_value():
    rows = [{"method": "mtadam", "n": 3}, {"method": "sgd", "n": 1000}]
    assert report.markdown(rows).splitlines() == [
        "| method | n    |",
        "| ------ | ---- |",
        "| mtadam | 3    |",
        "| sgd    | 1000 |",
    ]


def test_csv_keeps_every_value(tmp_path):
    rows = [{"method": "a, b", "accuracy": 0.1 + 0.2}, {"method": 'c "d"', "accuracy": 1e-12}]
    path = Path(tmp_path / "results.csv")
    report.write_csv(path, rows)
    assert [(row["method"], float(row["accuracy"])) for row in read_rows(path)] == [
        (r["method"], r["accuracy"]) for r in rows
    ]
    assert len(path.read_text().splitlines()) == 3
