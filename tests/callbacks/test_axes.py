"""Ticks are round, and names beside a chart keep their distance."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mtadam.callbacks.axes import factor_ticks, spread, step_ticks


@pytest.mark.parametrize(("low", "high"), [(-3.4, 1.2), (0.0, 0.0), (-0.06, 0.06), (-40.0, 2.0), (-0.5, 2.9)])
def test_factors_are_within_round_few_and_always_have_one(low, high):
    ticks = factor_ticks(low, high)
    assert 1.0 in ticks
    assert len(ticks) <= 10
    assert ticks == sorted(ticks)
    for tick in ticks:
        assert low <= math.log10(tick) <= high
        assert round(tick / 10 ** math.floor(math.log10(tick) + 1e-9), 9) in (1, 2, 5)


@given(st.integers(0, 10**7), st.integers(1, 10**7))
@settings(max_examples=100, deadline=None)
def test_steps_are_within_even_and_few(first, length):
    ticks = step_ticks(first, first + length)
    assert 1 <= len(ticks) <= 8
    assert all(first <= tick <= first + length for tick in ticks)
    assert len({b - a for a, b in itertools.pairwise(ticks)}) <= 1


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_names_keep_their_distance_order_and_the_sheet(wanted):
    places = spread(wanted, gap=5.0, low=0.0, high=100.0)
    assert min(places) >= 0
    assert max(places) <= 100 + 1e-9
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gaps = np.diff([places[index] for index in order])
    assert (gaps >= 5 - 1e-9).all()


def test_no_other_places_are_nearer_to_those_that_are_wanted():
    """Against a search of all places on a grid."""
    wanted, gap = [3.0, 4.0, 11.0], 3.0
    grid = np.arange(-2, 16, 0.25)
    one, two, three = np.meshgrid(grid, grid, grid, indexing="ij")
    cost = (one - 3) ** 2 + (two - 4) ** 2 + (three - 11) ** 2
    cost[(two - one < gap) | (three - two < gap)] = np.inf
    best = np.unravel_index(cost.argmin(), cost.shape)
    assert spread(wanted, gap, -10.0, 20.0) == pytest.approx(grid[list(best)].tolist())
