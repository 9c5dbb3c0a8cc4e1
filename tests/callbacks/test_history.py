"""A history keeps every extreme of a run, in little memory."""

import itertools
import math
import random

from lightning_mtadam.callbacks.history import AT_MOST, History


def test_a_short_run_is_kept_as_it_is():
    history = History()
    for step in range(5):
        history.add(10 * step, {"fit": float(step)} if step < 2 else {"fit": float(step), "late": 2.0})
    assert history.steps == [0, 10, 20, 30, 40]
    assert history.series["fit"] == [0, 1, 2, 3, 4]
    assert [math.isnan(value) for value in history.series["late"]] == [True, True, False, False, False]


def test_a_long_run_takes_little_and_loses_no_outlier():
    history, drawn = History(), random.Random(0)
    values = [drawn.uniform(1, 2) for _ in range(12_345)]
    outliers = {777: 1e6, 3_001: 1e-6, 12_000: 5e5}
    for step, value in enumerate(values):
        history.add(step, {"a": outliers.get(step, value), "b": value})
    assert len(history.steps) == len(history.series["a"]) == len(history.series["b"]) <= AT_MOST
    assert history.steps == sorted(set(history.steps))
    assert history.steps[0] == 0
    assert history.steps[-1] == 12_344
    assert set(outliers.values()) <= set(history.series["a"])
    assert min(history.series["b"]) == min(values)
    assert max(history.series["b"]) == max(values)
    for step, outlier in outliers.items():
        at = history.steps[history.series["a"].index(outlier)]
        assert abs(at - step) < len(values) / 100, "far from where it was"
    gaps = [b - a for a, b in itertools.pairwise(history.steps)]
    assert max(gaps) < len(values) / 100, "the beginning of a run is as fine as its end"


def test_what_was_never_there_stays_a_gap_in_a_long_run():
    history = History()
    for step in range(3 * AT_MOST):
        history.add(step, {"a": 1.0, **({"late": 2.0} if step >= 2 * AT_MOST else {})})
    late = [value for step, value in zip(history.steps, history.series["late"], strict=True) if step < 2 * AT_MOST - 50]
    assert late
    assert all(map(math.isnan, late))
    assert history.series["late"][-1] == 2.0


def test_steps_that_are_made_again_count_as_they_are_now():
    history = History()
    for step in (0, 10, 20, 30):
        history.add(step, {"a": float(step)})
    history.add(15, {"a": 7.0})
    assert history.steps == [0, 10, 15]
    assert history.series["a"] == [0, 10, 7]


def test_it_is_restored_from_its_state():
    history = History()
    history.add(0, {"a": 1.0})
    restored = History.from_state_dict(history.state_dict())
    restored.add(1, {"a": 2.0})
    assert restored.series == {"a": [1.0, 2.0]}
    assert history.series == {"a": [1.0]}, "they share nothing"
