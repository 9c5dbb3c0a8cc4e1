"""One chunk's update is lines 9 to 14 of Algorithm 1, written as a loop over elements, terms and steps."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_mtadam.optim import algorithm
from lightning_mtadam.optim.chunks import Coefficients, Moments, Numbers

TERMS, SIZE, STEPS = 3, 5, 12
BETA1, BETA2, LR, EPS = 0.9, 0.99, 0.05, 1e-8
DENOMINATORS = ("max", "mean", "own", "sum")
PRESENT = [[True, True, step % 3 != 1] for step in range(STEPS)]
"""The last term has no gradient in some steps; all reach from the first step on."""


def gradients_of(step):
    generator = np.random.default_rng(step)
    return generator.normal(size=(TERMS, SIZE)) * [[1.0], [30.0], [0.02]], generator.uniform(0.1, 2, size=TERMS)


class NaiveAlgorithm:
    """Lines 9 to 14 as the paper has them, with a first moment for each term and moments that are not corrected."""

    def __init__(self, denominator, amsgrad=False, maximize=False, weight_decay=0.0):
        self.denominator, self.amsgrad = denominator, amsgrad
        self.sign, self.weight_decay = -1.0 if maximize else 1.0, weight_decay
        self.parameter = np.linspace(-1, 1, SIZE)
        self.m, self.v, self.largest = (np.zeros((TERMS, SIZE)) for _ in range(3))
        self.v_sum, self.largest_sum = np.zeros(SIZE), np.zeros(SIZE)

    def step(self, t, gradients, scales):
        """Line 8 is done with ``scales``; t counts from 1."""
        for element in range(SIZE):
            balanced = [scales[i] * gradients[i][element] for i in range(TERMS)]
            total = sum(balanced)
            roots = []
            for i in range(TERMS):
                self.m[i, element] = BETA1 * self.m[i, element] + (1 - BETA1) * balanced[i]
                self.v[i, element] = BETA2 * self.v[i, element] + (1 - BETA2) * balanced[i] ** 2
                self.largest[i, element] = max(self.largest[i, element], self.v[i, element])
                second = self.largest[i, element] if self.amsgrad else self.v[i, element]
                roots.append(second / (1 - BETA2**t))
            self.v_sum[element] = BETA2 * self.v_sum[element] + (1 - BETA2) * total**2
            self.largest_sum[element] = max(self.largest_sum[element], self.v_sum[element])
            if self.denominator == "sum":
                roots = [(self.largest_sum if self.amsgrad else self.v_sum)[element] / (1 - BETA2**t)] * TERMS
            elif self.denominator != "own":
                roots = [max(roots) if self.denominator == "max" else sum(roots) / TERMS] * TERMS
            moved = self.parameter[element] * (1 - LR * self.weight_decay)
            for i in range(TERMS):
                corrected = self.m[i, element] / (1 - BETA1**t)
                moved -= self.sign * LR * corrected / (math.sqrt(roots[i]) + EPS)
            self.parameter[element] = moved


class Chunk:
    """What the optimizer holds of such a chunk, and its coefficients in a step."""

    def __init__(self, denominator, amsgrad=False, maximize=False, weight_decay=0.0, dtype=torch.float64):
        self.denominator, self.amsgrad, self.dtype = denominator, amsgrad, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.first_count = TERMS if denominator == "own" else 1
        self.second_count = 1 if denominator == "sum" else TERMS
        counts = self.first_count, self.second_count, self.second_count if amsgrad else 0
        self.parameter = torch.linspace(-1, 1, SIZE, dtype=torch.float64).to(dtype)
        self.moments = Moments(*[[torch.zeros(SIZE, dtype=dtype) for _ in range(count)] for count in counts])
        lr, decay = -LR if maximize else LR, 1 - LR * weight_decay if weight_decay else None
        self.numbers = Numbers(lr, 1 - BETA1, EPS, decay, denominator, False, None)

    def local(self, t, scales, columns=1):
        """The coefficients, one for the chunk or one for each of its elements."""

        def rows(values):
            return torch.tensor(np.repeat(values, columns).reshape(-1, columns), dtype=self.wide)

        second, first = 1 - BETA2**t, (1 - BETA1**t) * self.first_count / self.second_count
        return Coefficients(
            None if self.denominator == "sum" else rows(scales),
            rows([(1 - BETA2) / second] * self.second_count),
            rows([first] * self.first_count),
            rows([TERMS]) if self.denominator == "mean" else None,
            rows([second] * self.second_count) if self.amsgrad else None,
        )

    def held(self, gradients):
        return [torch.tensor(row).to(self.dtype) for row in gradients]

    def update(self, t, gradients, scales, *, columns=1, scratch=True, numbers=None):
        spare = torch.full((2, SIZE), torch.nan, dtype=self.wide) if scratch else None
        local = self.local(t, scales, columns)
        given = self.given(gradients, scales)
        algorithm.update(self.parameter, *given, self.moments, local, numbers or self.numbers, spare)

    def given(self, gradients, scales):
        """The balanced gradient, and the terms' own where they are looked at."""
        rows, factors = self.held(gradients), [torch.tensor([scale], dtype=self.wide) for scale in scales]
        total = algorithm.balance(rows, factors, torch.empty(SIZE, dtype=self.wide)).to(self.dtype)
        return total, [] if self.denominator == "sum" else rows

    @property
    def tensors(self):
        return [self.parameter, *(row for rows in self.moments for row in rows)]


def close(ours, theirs, tolerance=1e-12):
    np.testing.assert_allclose(ours.double().numpy(), theirs, rtol=tolerance, atol=tolerance)


VARIANTS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "weight decay": {"weight_decay": 0.3},
}


@pytest.mark.parametrize("columns", [1, SIZE])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_update_equals_lines_9_to_14(denominator, variant, columns):
    naive, ours = NaiveAlgorithm(denominator, **VARIANTS[variant]), Chunk(denominator, **VARIANTS[variant])
    for step in range(STEPS):
        gradients, scales = gradients_of(step)
        naive.step(step + 1, gradients, scales)
        ours.update(step + 1, gradients, scales, columns=columns)
        close(ours.parameter, naive.parameter)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_moments_are_those_of_the_paper_corrected_merged_or_both(denominator):
    naive, ours = NaiveAlgorithm(denominator), Chunk(denominator)
    for step in range(STEPS):
        gradients, scales = gradients_of(step)
        naive.step(step + 1, gradients, scales)
        ours.update(step + 1, gradients, scales)
    first, second, _ = ours.moments
    if denominator == "own":
        close(torch.stack(list(first)), naive.m)
    else:
        close(first[0] * len(second), naive.m.sum(0))
    corrected = naive.v_sum[None] if denominator == "sum" else naive.v
    close(torch.stack(list(second)), corrected / (1 - BETA2**STEPS))


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_terms_absorbed_at_different_times_equal_one_update(denominator):
    """In another order, and with a term that has no gradient in some steps: its second moment sees a zero."""
    whole, parts, naive = Chunk(denominator), Chunk(denominator), NaiveAlgorithm(denominator)
    for step in range(STEPS):
        gradients, scales = gradients_of(step)
        gradients[[not flag for flag in PRESENT[step]]] = 0
        naive.step(step + 1, gradients, scales)
        whole.update(step + 1, gradients, scales)
        (total, rows), local = parts.given(gradients, scales), parts.local(step + 1, scales)
        for term in (2, 0, 1) if rows else ():
            if PRESENT[step][term] or denominator == "own":
                balanced = algorithm.scaled(term, rows[term], local, parts.numbers, None)
                algorithm.absorb(term, balanced, parts.moments, local, parts.numbers)
            else:
                algorithm.forget(term, parts.moments, local)
        algorithm.move(parts.parameter, total, parts.moments, local, parts.numbers)
        close(parts.parameter, naive.parameter)
        for one, other in zip(parts.tensors, whole.tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_scratch_memory_and_what_was_in_it_change_nothing(denominator):
    with_scratch, without = Chunk(denominator, amsgrad=True), Chunk(denominator, amsgrad=True)
    for step in range(STEPS):
        with_scratch.update(step + 1, *gradients_of(step))
        without.update(step + 1, *gradients_of(step), scratch=False)
    for one, other in zip(with_scratch.tensors, without.tensors, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_gradients_are_left_as_they_are(denominator):
    ours, gradients = Chunk(denominator), gradients_of(0)[0]
    total, rows = ours.given(gradients, np.ones(TERMS))
    kept, scratch = [one.clone() for one in (total, *rows)], torch.empty(2, SIZE, dtype=torch.float64)
    local = ours.local(1, np.ones(TERMS))
    for numbers in (ours.numbers, ours.numbers._replace(skipped=torch.tensor(False))):
        algorithm.update(ours.parameter, total, rows, ours.moments, local, numbers, scratch)
        assert all(torch.equal(one, before) for one, before in zip((total, *rows), kept, strict=True))


NARROW = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 5e-3}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_narrow_dtypes_follow_the_loop(denominator, dtype, amsgrad):
    naive, ours = NaiveAlgorithm(denominator, amsgrad=amsgrad), Chunk(denominator, amsgrad=amsgrad, dtype=dtype)
    for step in range(STEPS):
        gradients, scales = gradients_of(step)
        scales = scales / [1.0, 30.0, 0.02]  # balanced, as they are; their squares stay within float16's range
        naive.step(step + 1, gradients, scales)
        ours.update(step + 1, gradients, scales)
        assert {tensor.dtype for tensor in ours.tensors} == {dtype}
        np.testing.assert_allclose(ours.parameter.double().numpy(), naive.parameter, rtol=0, atol=NARROW[dtype])


def test_moments_of_a_narrow_dtype_saturate_and_go_on():
    ours = Chunk("max", dtype=torch.float16)
    for step in range(3):
        before = ours.parameter.clone()
        ours.update(step + 1, np.full((TERMS, SIZE), 400.0), np.ones(TERMS))
        assert all(bool(tensor.isfinite().all()) for tensor in ours.tensors)
        assert bool((ours.parameter < before).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_a_step_that_may_change_nothing_changes_nothing(denominator, amsgrad, dtype):
    """The coefficients are those of ``Tables`` in such a step: weights of zero, an infinite factor."""
    options = {"amsgrad": amsgrad, "weight_decay": 0.3, "dtype": dtype}
    ours = Chunk(denominator, **options)
    for step in range(3):
        ours.update(step + 1, *gradients_of(step))
    before = [tensor.clone() for tensor in ours.tensors]
    local, nan = ours.local(4, [math.nan] * TERMS), torch.full((SIZE,), torch.nan, dtype=dtype)
    local = local._replace(weights=local.weights * 0, factor=local.factor * torch.inf)
    numbers = ours.numbers._replace(skipped=torch.tensor(True))
    rows = [torch.full((SIZE,), value).to(dtype) for value in (torch.inf, torch.nan, 1.0)]
    rows, scratch = [] if denominator == "sum" else rows, torch.empty(2, SIZE, dtype=ours.wide)
    algorithm.update(ours.parameter, nan, rows, ours.moments, local, numbers, scratch)
    assert all(torch.equal(one, other) for one, other in zip(before, ours.tensors, strict=True))


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_a_flag_that_is_true_changes_nothing(denominator):
    known, told = Chunk(denominator, amsgrad=True, weight_decay=0.3), Chunk(denominator, amsgrad=True, weight_decay=0.3)
    for step in range(STEPS):
        known.update(step + 1, *gradients_of(step))
        told.update(step + 1, *gradients_of(step), numbers=told.numbers._replace(skipped=torch.tensor(False)))
    for one, other in zip(known.tensors, told.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-15, atol=0)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_numbers_as_tensors_are_the_same_numbers(denominator):
    """As they are given to what is compiled."""
    floats, tensors = Chunk(denominator, weight_decay=0.3), Chunk(denominator, weight_decay=0.3)
    wrapped = [torch.tensor(value, dtype=torch.float64) for value in tensors.numbers[:4]]
    numbers = Numbers(*wrapped, *tensors.numbers[4:])
    for step in range(STEPS):
        floats.update(step + 1, *gradients_of(step))
        tensors.update(step + 1, *gradients_of(step), numbers=numbers)
    for one, other in zip(floats.tensors, tensors.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_with_eps_zero_an_element_without_a_gradient_stays_and_the_others_take_whole_steps(denominator):
    ours = Chunk(denominator)
    numbers = ours.numbers._replace(eps=0.0, no_eps=True)
    gradients = np.zeros((TERMS, SIZE))
    gradients[0, 1:] = 1e-100
    before = ours.parameter.clone()
    ours.update(1, gradients, np.ones(TERMS), numbers=numbers)
    assert torch.equal(ours.parameter[0], before[0])
    step = LR * (math.sqrt(TERMS) if denominator == "mean" else 1)
    torch.testing.assert_close(ours.parameter[1:], before[1:] - step, rtol=1e-12, atol=0)


def test_the_balanced_gradient_is_the_sum_over_the_scaled_terms():
    ours, (gradients, scales) = Chunk("max"), gradients_of(0)
    total, _ = ours.given(gradients, scales)
    close(total, (scales[:, None] * gradients).sum(0))


def test_with_a_constant_gradient_every_step_is_the_learning_rate():
    ours = Chunk("max")
    path = [ours.parameter.clone()]
    for step in range(STEPS):
        gradients = np.zeros((TERMS, SIZE))
        gradients[0] = 3.0
        ours.update(step + 1, gradients, np.ones(TERMS))
        path.append(ours.parameter.clone())
    for before, after in pairwise(path):
        torch.testing.assert_close(before - after, torch.full_like(before, LR))
