"""Advice on courses whose kind is known because they are written down here."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mtadam.diagnosis.advice import CHANGED, UNBALANCED, Course, advise

T = 12
APART = torch.eye(2).expand(T, 2, 2)
OPPOSED = torch.tensor([[1.0, -0.8], [-0.8, 1.0]]).expand(T, 2, 2)


def course_of(norms, cosines=APART, losses=None):
    """A course of terms that meet everywhere, from their norms, [T, I]."""
    norms = torch.tensor(norms, dtype=torch.float64)
    logs = torch.where(norms > 0, norms, torch.nan).log()
    terms = tuple("abcd"[: norms.shape[1]])
    if len(terms) != cosines.shape[1]:
        cosines = torch.eye(len(terms)).expand(len(norms), len(terms), len(terms))
    compared = logs[:, :, None] - logs[:, None]
    return Course(
        terms, tuple(range(len(norms))), norms if losses is None else losses, norms, compared, cosines.contiguous()
    )


def falling(first, last):
    return [first * (last / first) ** (t / (T - 1)) for t in range(T)]


def test_gradients_that_are_alike_are_left():
    found = advise(course_of([[1, 2]] * T))
    assert found.recommendation == "leave"
    assert found.weights == {"a": 1, "b": 1}
    assert found.ratio == pytest.approx(2)


def test_a_constant_factor_is_answered_by_its_inverse():
    found = advise(course_of([[1, 1e4, 0.5]] * T))
    assert found.recommendation == "reweight"
    assert found.weights == pytest.approx({"a": 1, "b": 1e-4, "c": 2})


def test_a_factor_that_changes_is_balanced_while_training():
    found = advise(course_of(list(zip(falling(1, 1), falling(1e4, 20), strict=True))))
    assert found.recommendation == "balance"
    assert found.change > CHANGED


def test_terms_that_oppose_each_other_need_more_than_balance():
    found = advise(course_of([[1, 1]] * T, OPPOSED))
    assert found.recommendation == "conflict-aware"
    assert found.conflicts == {("a", "b"): pytest.approx(-0.8)}
    both = advise(course_of([[1, 1e4]] * T, OPPOSED))
    assert both.recommendation == "conflict-aware"
    assert both.weights["b"] == pytest.approx(1e-4)


def test_terms_that_oppose_each_other_at_their_common_end_are_in_no_conflict():
    """The gradients of a minimum add up to zero."""
    norms = falling(1, 1e-3)
    assert advise(course_of(list(zip(norms, norms, strict=True)), OPPOSED)).recommendation == "leave"


def test_a_term_that_is_satisfied_at_once_is_not_amplified():
    found = advise(course_of([[1, 1], [1, 0.1], *[[1, 1e-4]] * (T - 2)]))
    assert found.recommendation == "leave"
    assert found.satisfied == ("b",)
    assert found.weights == {"a": 1, "b": 1}


def test_a_satisfied_term_does_not_hide_that_others_are_unbalanced():
    found = advise(course_of([[1, 1, 300], [1, 0.1, 300], *[[1, 1e-4, 300]] * (T - 2)]))
    assert (found.recommendation, found.satisfied) == ("reweight", ("b",))
    assert found.weights == pytest.approx({"a": 1, "b": 1, "c": 1 / 300}, rel=0.01)


def test_a_large_term_is_not_satisfied_before_it_is_smaller_than_the_others():
    found = advise(course_of([[1, 1e4], *[[1, 500]] * (T - 1)]))
    assert not found.satisfied
    assert found.recommendation == "reweight"


def test_a_term_that_vanishes_because_its_scale_is_off_is_not_called_satisfied():
    """Plain gradient descent with steps that the large term allows: the other one has not moved."""
    found = advise(course_of([[3, 4e4], [3, 4], *[[3, 0.3]] * (T - 2)]))
    assert not found.satisfied
    assert found.recommendation == "reweight"
    assert found.weights["b"] < 0.1


def test_a_term_that_is_satisfied_in_the_course_of_the_trial_is_compared_while_it_was_not():
    late = falling(1, 1e-3)
    for norms in (zip(falling(1, 1), late, strict=True), zip(late, falling(1, 1), strict=True)):
        assert advise(course_of(list(norms))).recommendation == "leave"


def test_terms_that_reach_their_common_end_at_unlike_speed_are_left():
    assert advise(course_of(list(zip(falling(1, 0.1), falling(1, 3e-4), strict=True)))).recommendation == "leave"


def test_a_gradient_that_grows_is_compared_all_the_time():
    found = advise(course_of(list(zip(falling(1, 1), falling(1e-2, 1e4), strict=True))))
    assert found.recommendation == "balance"


def test_a_term_that_vanishes_with_all_others_is_not_satisfied_alone():
    norms = [1.0, 0.1, *[1e-3] * (T - 2)]
    assert not advise(course_of(list(zip(norms, norms, strict=True)))).satisfied


def test_a_term_without_a_gradient_is_dead_and_has_no_part():
    found = advise(course_of([[1, 0, 2]] * T))
    assert (found.recommendation, found.dead) == ("leave", ("b",))


def test_a_term_that_is_absent_at_times_counts_where_it_is():
    found = advise(course_of([[1, 0], [1, 1e3]] * (T // 2)))
    assert found.recommendation == "reweight"
    assert found.weights["b"] == pytest.approx(1e-3)


@given(st.lists(st.floats(-6, 6), min_size=2, max_size=4))
def test_weights_make_gradients_equal(logs):
    norms = [10.0**log for log in logs]
    found = advise(course_of([norms] * T))
    ratios = [math.log10(one / other) for one, other in combinations(norms, 2)]
    if max(map(abs, ratios)) < math.log10(UNBALANCED) - 1e-9:
        assert set(found.weights.values()) == {1.0}
    elif max(map(abs, ratios)) > math.log10(UNBALANCED) + 1e-9:
        balanced = [norm * weight for norm, weight in zip(norms, found.weights.values(), strict=True)]
        assert balanced == pytest.approx([norms[0]] * len(norms), rel=0.01)
