"""The tables of all parameters are their states' rows, and coefficients are those of lines 8, 11 and 12."""

import math

import pytest
import torch

from lightning_mtadam.layers import LayerNames
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.state import BALANCE_KEYS, allocate
from lightning_mtadam.optim.tables import Tables

TERMS = ("a", "b")
BETAS = (0.9, 0.99, 0.5)
ATTRIBUTES = ("clocks", "norms", "counts", "log_scales", "log_scale_counts")


def tables_of(parameters, *, split=None, frozen=(), betas=(BETAS, BETAS), **options):
    """Tables of two groups, the second from ``split`` on."""
    split = len(parameters) if split is None else split
    parts = [part for part in (parameters[:split], parameters[split:]) if part]
    groups = [{"params": part, "amsgrad": False, "betas": beta} for part, beta in zip(parts, betas, strict=False)]
    for index in frozen:
        parameters[index].requires_grad_(False)
    options = Options(**options)
    names, state = LayerNames(options.layers), {}
    for group in groups:
        names.add(group)
    allocate(state, groups, [], options, len(TERMS))
    return Tables(options, groups, state, names.layers(groups), names.labels, TERMS), state, groups


def parameters(*dtypes):
    return [torch.ones(2, dtype=dtype, requires_grad=True) for dtype in dtypes or (torch.float64,) * 3]


def measured(tables, observed, touched=None, present=(True, True), finite=None):
    observed = torch.tensor(observed, dtype=tables.dtype)
    touched = torch.tensor([True] * len(observed) if touched is None else touched)[:, None]
    weighed = tables.weighed(observed, touched, torch.tensor(present))
    return weighed.scales, tables.measured(observed, touched, weighed, finite)


def snapshot(tables):
    return {name: getattr(tables, name).clone() for name in ATTRIBUTES}


OBSERVED = [[2.0, 6.0], [1.0, 0.0], [0.0, 4.0]]


def test_states_hold_the_rows_of_the_tables():
    tables, state, _ = tables_of(parameters())
    measured(tables, OBSERVED)
    for name, key in zip(ATTRIBUTES, BALANCE_KEYS, strict=True):
        for row, member in zip(getattr(tables, name), tables.members, strict=True):
            one = state[tables.parameters[member]][key]
            assert torch.equal(one, row)
            assert one.data_ptr() == row.data_ptr()
    assert tables.norms.tolist() == OBSERVED
    assert tables.clocks.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 1]]


def test_tables_made_anew_from_the_states_go_on_from_there():
    """As after a checkpoint, or when a group is added."""
    tables, state, groups = tables_of(parameters())
    measured(tables, OBSERVED)
    names = LayerNames("parameter")
    names.add(groups[0])
    again = Tables(tables.options, groups, state, names.layers(groups), names.labels, TERMS)
    for one, other in zip(measured(again, OBSERVED)[1], measured(tables, OBSERVED)[1], strict=True):
        assert one is other or torch.equal(one, other)


def test_scales_and_coefficients_are_those_of_lines_8_11_and_12():
    tables, _, _ = tables_of(parameters())
    for step in (1, 2, 3):
        scales, coefficients = measured(tables, OBSERVED)
        expected = torch.tensor([[1.0, 2 / 6], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(scales, expected)
        torch.testing.assert_close(coefficients.scales, expected)
        weight = (1 - BETAS[1]) / (1 - BETAS[1] ** step)
        weights = torch.where(expected > 0, torch.tensor(weight, dtype=torch.float64), 0)
        torch.testing.assert_close(coefficients.weights, weights)
        factor = torch.full((3, 1), (1 - BETAS[0] ** step) / len(TERMS), dtype=torch.float64)
        torch.testing.assert_close(coefficients.factor, factor)
        assert coefficients.reaching is None
        assert coefficients.correction is None


@pytest.mark.parametrize("update", ["sum", "mean"])
@pytest.mark.parametrize("denominator", ["max", "mean", "own", "sum"])
def test_the_factor_counts_moments_and_the_terms_that_reach(denominator, update):
    tables, _, _ = tables_of(parameters(), denominator=denominator, update=update)
    _, coefficients = measured(tables, OBSERVED)
    reaching = torch.tensor([[2.0], [1.0], [1.0]], dtype=torch.float64)
    expected = torch.full((3, 1), 1 - BETAS[0], dtype=torch.float64)
    if denominator in ("max", "mean"):
        expected = expected / 2
    if denominator == "own":  # a clock of its own that has not started corrects nothing
        expected = torch.tensor([[0.1, 0.1], [0.1, 1.0], [1.0, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(coefficients.factor, expected * (reaching if update == "mean" else 1))
    if denominator == "mean":
        assert torch.equal(coefficients.reaching, reaching)
    else:
        assert coefficients.reaching is None


def test_what_is_absent_or_not_touched_moves_nothing():
    tables, _, _ = tables_of(parameters())
    measured(tables, OBSERVED)
    before = snapshot(tables)
    zeros = [[9.0, 0.0], [0.0, 0.0], [9.0, 0.0]]
    measured(tables, zeros, touched=[True, False, True], present=(True, False))
    assert torch.equal(tables.norms[1], before["norms"][1])
    assert torch.equal(tables.clocks[1], before["clocks"][1])
    assert torch.equal(tables.norms[:, 1], before["norms"][:, 1])
    assert tables.norms[:, 0].tolist() == [(2.0 + 9.0) / 2, 1.0, 9.0]
    assert tables.clocks.tolist() == [[2, 2, 2], [1, 1, 0], [2, 1, 2]]


@pytest.mark.parametrize("kind", ["measured", "light"])
def test_a_step_that_is_not_finite_changes_no_table_and_no_moment(kind):
    tables, _, _ = tables_of(parameters(), denominator="sum", layers="global", balance_every=3)
    measured(tables, OBSERVED)
    before, no = snapshot(tables), torch.tensor(False)
    if kind == "measured":
        _, coefficients = measured(tables, [[math.nan, math.inf]] * 3, finite=no)
    else:
        touched, bad = torch.ones(3, 1, dtype=torch.bool), torch.full((3, 1), math.nan, dtype=torch.float64)
        coefficients = tables.light(bad, touched, tables.frozen_scales, no)
    for name, value in before.items():
        assert torch.equal(getattr(tables, name), value), name
    assert not coefficients.weights.any()
    assert bool((coefficients.factor == math.inf).all())


def test_a_light_step_leaves_the_norms_and_records_the_frozen_scales():
    tables, _, _ = tables_of(parameters(), denominator="sum", layers="global", balance_every=3)
    measured(tables, OBSERVED)
    before, frozen = snapshot(tables), tables.frozen_scales
    coefficients = tables.light(torch.ones(3, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.bool), frozen, None)
    assert torch.equal(tables.norms, before["norms"])
    assert torch.equal(tables.counts, before["counts"])
    assert tables.clocks[:, 0].tolist() == [2, 2, 2]
    assert coefficients.scales is None
    assert tables.log_scale_counts.tolist() == [[2, 2]] * 3
    torch.testing.assert_close(tables.average_scales(), frozen)


def test_layers_of_several_parameters_have_one_norm_and_each_parameter_its_scales():
    tables, _, _ = tables_of(parameters(), layers="global")
    scales, coefficients = measured(tables, [[3.0, 0.0], [4.0, 12.0], [0.0, 5.0]])
    torch.testing.assert_close(tables.norms, torch.tensor([[5.0, 13.0]] * 3, dtype=torch.float64))
    shares = [[9 / 25, 0.0], [16 / 25, 144 / 169], [0.0, 25 / 169]]
    torch.testing.assert_close(tables.shares, torch.tensor(shares, dtype=torch.float64))
    torch.testing.assert_close(scales, torch.tensor([[1.0, 4 / 12]], dtype=torch.float64))  # where they meet
    torch.testing.assert_close(coefficients.scales, scales.expand(3, 2))


def test_a_frozen_parameter_has_no_row_and_the_others_keep_their_layers():
    tables, _, _ = tables_of(parameters(), frozen=[1])
    assert (tables.members, tables.row_of) == ([0, 2], {0: 0, 2: 1})
    assert tables.names == ["parameter_0", "parameter_2"]
    scales, coefficients = measured(tables, [[2.0, 6.0], [4.0, 1.0]])
    assert scales.shape == (3, 2)
    assert scales[1].tolist() == [0, 0], "the layer of the frozen one"
    torch.testing.assert_close(coefficients.scales, scales[[0, 2]])
    torch.testing.assert_close(scales[2], torch.tensor([1.0, 4.0], dtype=torch.float64))


def test_each_group_has_its_betas_and_a_layer_the_largest_beta3():
    betas = (BETAS, (0.5, 0.9, 0.9))
    tables, _, groups = tables_of(parameters(), split=1, betas=betas)
    measured(tables, [[1.0, 1.0]] * 3)
    _, coefficients = measured(tables, [[2.0, 2.0]] * 3)
    torch.testing.assert_close(tables.norms[:, 0], torch.tensor([1.5, 1.1, 1.1], dtype=torch.float64))
    expected = [[(1 - 0.81) / 2], [(1 - 0.25) / 2], [(1 - 0.25) / 2]]
    torch.testing.assert_close(coefficients.factor, torch.tensor(expected, dtype=torch.float64))
    expected = [(1 - beta) / (1 - beta**2) for beta in (0.99, 0.9, 0.9)]
    torch.testing.assert_close(coefficients.weights[:, 0], torch.tensor(expected, dtype=torch.float64))
    together, _, _ = tables_of(parameters(), split=1, betas=betas, layers="global")
    measured(together, [[1.0, 1.0]] * 3)
    measured(together, [[2.0, 2.0]] * 3)
    torch.testing.assert_close(together.norms, torch.full((3, 2), 1.1 * math.sqrt(3), dtype=torch.float64))
    groups[1]["betas"] = BETAS
    tables.follow_groups()
    _, coefficients = measured(tables, [[2.0, 2.0]] * 3)
    torch.testing.assert_close(coefficients.factor, torch.full((3, 1), (1 - 0.9**3) / 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtypes", "wide"),
    [((torch.bfloat16, torch.float16), torch.float32), ((torch.bfloat16, torch.float64), torch.float64)],
)
def test_tables_are_wide_whatever_the_parameters_are(dtypes, wide):
    tables, _, _ = tables_of(parameters(*dtypes))
    assert {getattr(tables, name).dtype for name in ATTRIBUTES} == {wide}
    assert all(one is None or one.dtype == wide for one in measured(tables, OBSERVED[:2])[1])


def test_averages_are_nan_where_a_term_never_reached_and_zero_where_its_importance_is():
    tables, _, _ = tables_of(parameters(), importance={"b": 0.0})
    measured(tables, [[2.0, 6.0], [1.0, 0.0], [0.0, 4.0]])
    averages = tables.average_scales()
    assert averages.dtype == torch.float64
    torch.testing.assert_close(averages[0], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert averages.isnan().tolist() == [[False, False], [False, True], [True, False]]
