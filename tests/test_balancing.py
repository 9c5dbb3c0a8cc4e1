"""Lines 7 and 8 of Algorithm 1 as pure functions: against plain loops in numpy, and what must not change them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mtadam import balancing

TERMS = ("a", "b", "c")
ANCHORS = ("first", "b", "c", "mean", "max", "unit")
norm = st.one_of(st.just(0.0), st.floats(1e-20, 1e20))
tables = st.integers(1, 4).flatmap(lambda rows: st.lists(st.tuples(norm, norm, norm), min_size=rows, max_size=rows))
factors = st.tuples(*[st.floats(-6, 6).map(lambda exponent: 10**exponent) for _ in TERMS])


def table(rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def scales(norms, anchor, importance=(1.0, 1.0, 1.0), max_scale=math.inf):
    target = balancing.target_norms(norms, anchor, TERMS)
    return balancing.balance_scales(norms, target, norms.new_tensor(importance), max_scale)


def close(ours, expected, tolerance=1e-12, **options):
    torch.testing.assert_close(ours, torch.as_tensor(expected, dtype=ours.dtype), rtol=tolerance, atol=0, **options)


# The anchor   (line 8)


def naive_mean(row):
    known = [value for value in row if value > 0]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else 0.0


def naive_target(row, anchor):
    if anchor == "unit":
        return 1.0
    if anchor == "mean":
        return naive_mean(row)
    if anchor == "max":
        return max(row)
    return row[0 if anchor == "first" else TERMS.index(anchor)] or naive_mean(row)


@given(rows=tables)
@pytest.mark.parametrize("anchor", ANCHORS)
def test_the_target_is_the_anchors_norm_or_the_mean_of_those_that_reach(anchor, rows):
    expected = [[naive_target(row, anchor)] for row in rows]
    close(balancing.target_norms(table(rows), anchor, TERMS), expected)


def test_without_an_anchor_there_is_no_target_and_each_scale_is_the_importance():
    norms = table([(1.0, 5.0, 0.0), (2.0, 1.0, 3.0)])
    assert balancing.target_norms(norms, None, TERMS) is None
    assert scales(norms, None, (1.0, 0.5, 2.0)).tolist() == [[1.0, 0.5, 2.0]] * 2


@pytest.mark.parametrize(
    ("anchor", "reference"),
    [("first", 0), ("unit", 0), (None, 0), ("a", 0), ("b", 1), ("c", 2), ("mean", "mean"), ("max", "max")],
)
def test_balance_weights_are_relative_to_the_anchor_or_else_to_the_first_term(anchor, reference):
    assert balancing.reference_of(anchor, TERMS) == reference


def test_balance_weights_are_ratios_to_the_reference_and_nan_where_a_term_never_reached():
    norms = table([(2.0, 6.0, 0.0)])
    weights = balancing.balance_weights(norms, balancing.reference_norms(norms, 0))
    assert weights[0, :2].tolist() == [1.0, 3.0]
    assert bool(weights[0, 2].isnan())


@given(rows=tables)
@pytest.mark.parametrize("anchor", ANCHORS)
def test_the_balance_weight_is_the_inverse_of_the_scale(anchor, rows):
    norms = table(rows)
    target = balancing.target_norms(norms, anchor, TERMS)
    weights, found = balancing.balance_weights(norms, target), scales(norms, anchor)
    close((weights * found)[norms > 0], torch.ones(int((norms > 0).sum())))


# The geometric mean


@given(rows=tables)
def test_the_geometric_mean_is_that_of_the_norms_that_are_not_zero(rows):
    close(balancing.geometric_mean(table(rows)), [[naive_mean(row)] for row in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(value=st.floats(2.0**-60, 2.0**60, width=32), count=st.integers(1, 4))
def test_the_geometric_mean_of_one_norm_or_of_equal_ones_is_exact(dtype, value, count):
    norms = torch.tensor([[value] * count + [0.0] * (4 - count)], dtype=dtype)
    assert float(balancing.geometric_mean(norms)) == value


def test_the_geometric_mean_of_norms_far_apart_is_not_zero():
    norms = torch.tensor([[1e-25, 1e25, 0.0], [1e-30, 1e15, 1e15]])
    mean = balancing.geometric_mean(norms)
    torch.testing.assert_close(mean, torch.tensor([[1.0], [1.0]]), rtol=1e-4, atol=0)
    assert bool((balancing.balance_scales(norms, mean, torch.ones(3), math.inf)[:, :2] > 0).all())


# The scales   (line 8)


@given(rows=tables, factor=factors)
@pytest.mark.parametrize("anchor", ANCHORS)
def test_balanced_norms_are_the_targets_whatever_the_terms_factors(anchor, rows, factor):
    norms = table(rows) * table(factor)
    balanced = scales(norms, anchor) * norms
    expected = balancing.target_norms(norms, anchor, TERMS).expand_as(norms)
    close(balanced[norms > 0], expected[norms > 0])
    assert not scales(norms, anchor)[norms == 0].any()


@given(rows=tables, factor=factors)
@pytest.mark.parametrize("anchor", ["first", "b", "unit"])
def test_a_factor_on_a_term_other_than_the_anchor_divides_its_scale_and_no_other(anchor, rows, factor):
    """At layers that the anchor reaches, or where no anchor is needed."""
    anchored = None if anchor == "unit" else balancing.reference_of(anchor, TERMS)
    factor = torch.tensor([1.0 if term == anchored else one for term, one in enumerate(factor)], dtype=torch.float64)
    norms = table(rows)
    reached = torch.ones(len(rows), dtype=torch.bool) if anchored is None else norms[:, anchored] > 0
    close((scales(norms * factor, anchor) * factor)[reached], scales(norms, anchor)[reached])


@given(rows=tables, exponent=st.floats(-6, 6))
@pytest.mark.parametrize("anchor", [anchor for anchor in ANCHORS if anchor != "unit"])
def test_a_factor_on_every_term_changes_no_scale(anchor, rows, exponent):
    close(scales(table(rows) * 10**exponent, anchor), scales(table(rows), anchor))


@given(rows=tables)
@pytest.mark.parametrize("anchor", ["mean", "max", "unit"])
def test_without_an_anchor_term_the_order_of_the_terms_does_not_matter(anchor, rows):
    order = [2, 0, 1]
    close(scales(table(rows)[:, order], anchor), scales(table(rows), anchor)[:, order])


@given(rows=tables, importance=st.tuples(*[st.floats(0, 10)] * 3), cap=st.floats(0.1, 1e3))
@pytest.mark.parametrize("anchor", ANCHORS)
def test_importance_multiplies_what_is_capped(anchor, rows, importance, cap):
    expected = scales(table(rows), anchor).clamp(max=cap) * table(importance)
    close(scales(table(rows), anchor, importance, cap), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_are_finite_however_small_a_norm_is(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    norms = torch.tensor([[1e30, tiny, 0.0]], dtype=dtype)
    found = scales(norms, "first", (1.0, 10.0, 1.0))
    assert bool(found.isfinite().all())
    assert float(found[0, 1]) > 1e30
    assert float(found[0, 2]) == 0


# The average of the norms   (line 7)


def naive_norms(observed, present, beta3, norm_init, quadratic):
    """One layer and term, step by step: the norm as the balance uses it, nan before it is reached."""
    average, count, power = None, 0, 2 if quadratic else 1
    for value, here in zip(observed, present, strict=True):
        if here and (count or value > 0):
            start = {"first": value**power, "unbiased": 0.0, "one": 1.0}[norm_init]
            previous = start if average is None else average
            average, count = beta3 * previous + (1 - beta3) * value**power, count + 1
        correction = 1 - beta3**count if norm_init == "unbiased" else 1.0
        yield 0.0 if average is None else (average / correction) ** (1 / power)


@given(
    observed=st.lists(st.tuples(*[st.one_of(st.just(0.0), st.floats(1e-3, 1e3))] * 3), min_size=1, max_size=12),
    absent=st.lists(st.tuples(*[st.booleans()] * 3), min_size=12, max_size=12),
    beta3=st.sampled_from([0.0, 0.5, 0.9]),
    quadratic=st.booleans(),
)
@pytest.mark.parametrize("norm_init", ["first", "unbiased", "one"])
def test_norms_are_averaged_as_line_7_says_from_when_the_term_reaches(norm_init, observed, absent, beta3, quadratic):
    norms = counts = torch.zeros(1, 3, dtype=torch.float64)
    decay, found = torch.tensor(beta3, dtype=torch.float64), []
    for row, flags in zip(observed, absent, strict=False):
        present, seen = ~torch.tensor(flags), table([row])
        norms, counts = balancing.update_norms(norms, counts, seen, present, decay, norm_init, quadratic=quadratic)
        found.append(balancing.corrected_norms(norms, counts, decay, norm_init, quadratic=quadratic)[0])
    for term, column in enumerate(zip(*observed, strict=True)):
        here = [not flags[term] for flags in absent[: len(observed)]]
        expected = list(naive_norms(column, here, beta3, norm_init, quadratic))
        close(torch.stack(found)[:, term], expected)


@given(factor=factors, observed=st.lists(st.tuples(*[st.floats(1e-3, 1e3)] * 3), min_size=1, max_size=8))
@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("norm_init", ["first", "unbiased"])
def test_a_factor_on_a_term_is_a_factor_on_its_average(norm_init, quadratic, factor, observed):
    def average(by):
        norms = counts = torch.zeros(1, 3, dtype=torch.float64)
        decay, here = torch.tensor(0.9, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
        for row in observed:
            seen = table([row]) * table(by)
            norms, counts = balancing.update_norms(norms, counts, seen, here, decay, norm_init, quadratic=quadratic)
        return balancing.corrected_norms(norms, counts, decay, norm_init, quadratic=quadratic)

    close(average(factor), average((1.0, 1.0, 1.0)) * table(factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_norm_is_kept_to_the_last_digit(dtype):
    observed = torch.linspace(0.1, 7.3, 60, dtype=dtype).view(20, 3)
    zero, here = torch.zeros_like(observed), torch.ones(3, dtype=torch.bool)
    norms, counts = balancing.update_norms(zero, zero, observed, here, torch.tensor(0.9, dtype=dtype), "first")
    assert torch.equal(norms, observed)
    assert bool((counts == 1).all())


def test_a_decay_for_each_layer_is_that_of_the_layer():
    decay = table([(0.5,), (0.9,)])
    zero, here = torch.zeros(2, 1, dtype=torch.float64), torch.ones(1, dtype=torch.bool)
    norms, _ = balancing.update_norms(zero, zero, table([(2.0,), (2.0,)]), here, decay, "one")
    close(norms, [[1.5], [1.1]])


# Rounding noise


@given(rows=tables, factor=factors, silent=st.tuples(*[st.booleans()] * 3))
def test_noise_is_a_faint_share_of_the_terms_own_norm_beside_a_clear_one_that_is_not_silent(rows, factor, silent):
    faint = 128 * 2.0**-52
    totals = [math.hypot(*column) or math.nan for column in zip(*rows, strict=True)]
    shares = [[value / total for value, total in zip(row, totals, strict=True)] for row in rows]
    clear = [any(share > 100 * faint and not flag for share, flag in zip(row, silent, strict=True)) for row in shares]
    expected = [[flag and share < faint for share in row] for row, flag in zip(shares, clear, strict=True)]
    found = balancing.loudness(table(rows) * table(factor), torch.tensor(silent))[0]
    assert found.tolist() == expected


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_norm_over_the_network_does_not_over_or_underflow(size):
    norms = torch.tensor([[size, size], [1e-7 * size, size]])
    assert balancing.loudness(norms, torch.tensor([False, False]))[0].tolist() == [[False, False], [True, False]]


@given(observed=st.lists(st.floats(0, 10), min_size=1, max_size=30), beta3=st.sampled_from([0.0, 0.5, 0.9]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_its_start_an_average_from_one_is_what_was_observed_but_for_rounding(dtype, observed, beta3):
    norms = counts = torch.zeros(1, 1, dtype=dtype)
    decay, here, expected = torch.tensor(beta3, dtype=torch.float64), torch.tensor([True]), 0.0
    for value in [1.0, *observed]:
        seen = torch.tensor([[value]], dtype=dtype)
        norms, counts = balancing.update_norms(norms, counts, seen, here, decay, "one")
        expected = beta3 * expected + (1 - beta3) * float(seen)
    expected /= 1 - beta3 ** float(counts)
    found, epsilon = float(balancing.without_start(norms, counts, decay)), torch.finfo(dtype).eps
    lost = (float(counts) + 2) * epsilon * beta3 ** float(counts) / (1 - beta3 ** float(counts))
    assert found == pytest.approx(expected, rel=40 * epsilon, abs=2 * lost)


# Layers


@given(data=st.data(), rows=tables)
def test_the_norm_of_a_layer_is_that_of_all_its_entries(data, rows):
    layer_of = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows))))
    found = balancing.layer_norms(table(rows), layer_of, 3)
    for layer in range(3):
        members = [row for row, at in zip(rows, layer_of.tolist(), strict=True) if at == layer]
        expected = [math.hypot(*column) for column in zip(*members, strict=True)] or [0.0] * 3
        close(found[layer], expected)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_norm_of_a_layer_does_not_over_or_underflow(size):
    found = balancing.layer_norms(torch.tensor([[3 * size], [4 * size]]), torch.tensor([0, 0]), 1)
    close(found, [[5 * size]], 1e-6)


def test_a_layers_row_is_the_largest_of_its_parameters():
    rows = table([(1.0, 5.0), (3.0, 2.0), (9.0, 0.0)])
    assert balancing.by_layer(rows, torch.tensor([2, 2, 0]), 3).tolist() == [[9.0, 0.0], [0.0, 0.0], [3.0, 5.0]]


# Clocks   (lines 11 and 12)


@given(steps=st.lists(st.tuples(st.booleans(), st.tuples(*[st.booleans()] * 3)), min_size=1, max_size=10))
def test_clocks_count_as_adams_and_a_late_terms_begins_at_one(steps):
    clocks = torch.zeros(1, 4)
    shared, own = 0, [0, 0, 0]
    for touched, reaching in steps:
        clocks = balancing.tick(clocks, torch.tensor([reaching]), torch.tensor([[touched]]))
        if touched:
            shared, running = shared + 1, any(own)
            start = 1 if running else shared
            own = [one + 1 if one else start if flag else 0 for one, flag in zip(own, reaching, strict=True)]
        assert clocks.tolist() == [[shared, *own]]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999999])
def test_bias_corrections_are_accurate_also_where_they_are_small(beta):
    clocks = torch.tensor([0.0, 1.0, 2.0, 1000.0])
    log_beta = torch.tensor(beta, dtype=torch.float64).log()
    expected = [1.0, *(-math.expm1(clock * math.log(beta)) if beta else 1.0 for clock in (1, 2, 1000))]
    close(balancing.bias_correction(clocks, log_beta), expected, 1e-6)
    close(balancing.bias_correction(clocks.double(), log_beta), expected, 1e-14)


# The scales' average over a run


@given(
    seen=st.lists(st.tuples(*[st.one_of(st.just(0.0), st.floats(1e-6, 1e6))] * 3), min_size=1, max_size=10),
    finite=st.lists(st.booleans(), min_size=10, max_size=10),
)
def test_scales_are_averaged_geometrically_over_the_steps_in_which_they_are_above_zero(seen, finite):
    averages, counts = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    for row, flag in zip(seen, finite, strict=False):
        balancing.record_scales(averages, counts, table([row]), torch.tensor(flag))
    found = balancing.average_scales(averages, counts, torch.tensor([0]), 1)
    for term, column in enumerate(zip(*seen, strict=True)):
        used = [value for value, flag in zip(column, finite, strict=False) if flag and value > 0]
        assert float(counts[0, term]) == len(used)
        close(found[0, term], np.exp(np.mean(np.log(used))) if used else math.nan, 1e-10, equal_nan=True)


def test_a_mean_of_equal_scales_is_exact():
    averages, counts = torch.zeros(1, 1), torch.zeros(1, 1)
    for _ in range(1000):
        balancing.record_scales(averages, counts, torch.tensor([[0.3]]), None)
    assert torch.equal(averages, torch.tensor([[0.3]]).log())


def test_a_layer_takes_the_steps_of_all_its_parameters():
    """Of two that were trained for three steps and for one."""
    averages, counts = table([(2.0,), (6.0,)]), table([(3.0,), (1.0,)])
    found = balancing.average_scales(averages, counts, torch.tensor([1, 1]), 2)
    close(found, [[math.nan], [math.exp(3.0)]], equal_nan=True)


@pytest.mark.parametrize(
    ("dtypes", "wide"),
    [
        ((), torch.float32),
        ((torch.bfloat16,), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_the_wide_dtype_is_fp32_or_the_widest(dtypes, wide):
    assert balancing.wide_dtype([torch.zeros(1, dtype=dtype) for dtype in dtypes]) == wide


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_are_those_of_the_entries_also_where_a_narrow_square_would_overflow(dtype):
    gradients = [
        torch.tensor([300.0, 400.0], dtype=dtype),
        None,
        torch.zeros(0, dtype=dtype),
        torch.ones((), dtype=dtype),
    ]
    found = balancing.norms_of(gradients)
    assert found[1] is None
    assert [float(found[index]) for index in (0, 2, 3)] == [500.0, 0.0, 1.0]
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)


def test_where_nothing_is_there_no_norm_is():
    assert balancing.norms_of([None, None]) == [None, None]
    assert balancing.norms_of([]) == []


@pytest.mark.parametrize("uniform", [False, True])
def test_a_table_has_a_column_for_each_term_and_zeros_where_nothing_is(uniform):
    one = torch.tensor
    columns = [[one(1.0), None, one(3.0)], [None, one(5.0), one(6.0)]]
    table = balancing.norm_table(columns, torch.zeros(3, 2), uniform=uniform)
    assert table.tolist() == [[1.0, 0.0], [0.0, 5.0], [3.0, 6.0]]
    assert table.is_contiguous()


def test_a_table_takes_the_dtype_that_it_is_told():
    columns = [[torch.tensor(0.5), torch.tensor(2.0, dtype=torch.float64)]]
    assert balancing.norm_table(columns, torch.zeros(0, dtype=torch.float64)).dtype == torch.float64
