"""Which steps measure the balance: a pure function of the step and of ``balance_every``."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mtadam.schedule import await_terms, decay_of_norms, due_terms, is_measured, next_measurement
from tests.oracles.naive_balance_every import measured_steps

STEPS, EVERY = st.integers(0, 20_000), st.integers(2, 500)


@given(every=EVERY, count=st.integers(1, 3_000))
def test_the_measured_steps_are_those_of_the_naive_sequence(every, count):
    assert [step for step in range(count) if is_measured(step, every)] == measured_steps(every, count)


@given(step=STEPS, every=EVERY)
def test_the_next_measurement_is_measured_and_at_most_balance_every_away(step, every):
    found = next_measurement(step, every)
    assert step <= found < step + every
    assert next_measurement(found, every) == found
    assert is_measured(found, every)
    assert not any(is_measured(between, every) for between in range(step, found))


@given(step=STEPS, later=st.integers(0, 2_000), every=EVERY)
def test_later_steps_are_measured_later(step, later, every):
    assert next_measurement(step, every) <= next_measurement(step + later, every)


@given(step=STEPS, every=EVERY)
def test_gaps_do_not_shrink(step, every):
    first = next_measurement(step, every)
    second = next_measurement(first + 1, every)
    third = next_measurement(second + 1, every)
    assert second - first <= third - second <= every


@given(step=STEPS)
def test_with_one_every_step_is_measured(step):
    assert is_measured(step, 1)


@pytest.mark.parametrize(
    ("every", "decay"), [(1, 0.9), (5, 0.9**0.25), (10, 0.9**0.5), (20, 0.9), (50, 0.9), (200, 0.9)]
)
def test_measurements_that_lie_close_count_less(every, decay):
    assert decay_of_norms(0.9, every) == pytest.approx(decay, rel=1e-15)


@given(steps=st.lists(st.booleans(), min_size=1, max_size=300), every=st.integers(2, 60))
def test_a_term_is_measured_in_the_first_step_in_which_it_is_after_as_many_as_balance_every(steps, every):
    last = None
    for step, here in enumerate(steps):
        group = {"steps": step, "measured": () if last is None else (("rare", last),)}
        due = due_terms(["rare"] if here else [], group, every)
        assert bool(due) == (here and (last is None or step - last >= every or is_measured(step, every)))
        last = step if due else last


def test_a_term_that_came_too_late_is_waited_for_as_long_as_it_was_not_measured():
    group = {"steps": 700, "measured": (("rare", 100), ("often", 690))}
    assert await_terms(["rare", "often", "new"], group, 50) == {"rare": 1300, "often": 750, "new": 1400}
