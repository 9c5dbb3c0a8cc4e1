"""Terms compared where they meet, as pure functions: against plain loops, and what must not change them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mtadam import meetings

norm = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


@st.composite
def networks(draw):
    """The norms of I terms at P parameters, in layers."""
    terms, layers = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    parameters = draw(st.integers(1, 6))
    table = [[draw(norm) for _ in range(terms)] for _ in range(parameters)]
    return table, [draw(st.integers(0, layers - 1)) for _ in range(parameters)], layers


def tables(network):
    """Norms by layer [L, I], shares [P, I], and the layers."""
    table, layer_of, layers = network
    norms = torch.tensor(table, dtype=torch.float64)
    index = torch.tensor(layer_of)
    squares = torch.zeros(layers, norms.shape[1], dtype=torch.float64).index_add_(0, index, norms.square())
    shares = torch.where(norms > 0, norms.square() / squares[index], 0)
    return squares.sqrt(), shares, index


def met(network):
    return meetings.norms_where_met(*tables(network))


def naive_met(network, layer, i, j):
    table, layer_of, _ = network
    return math.sqrt(sum(row[i] ** 2 for row, at in zip(table, layer_of, strict=True) if at == layer and row[j] > 0))


@given(networks())
def test_norms_are_those_on_the_parameters_that_both_reach(network):
    found = met(network)
    for layer, matrix in enumerate(found.tolist()):
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                assert value == pytest.approx(naive_met(network, layer, i, j), rel=1e-12, abs=0)


def naive_compared(matrix):
    """The logarithms as a dict of pairs: first of those that meet, then over ever longer ways, all at once."""
    terms = range(len(matrix))
    found = {
        (i, j): math.log(matrix[i][j] / matrix[j][i]) for i in terms for j in terms if matrix[i][j] and matrix[j][i]
    }
    reach = 1
    while reach < len(matrix) - 1:
        reach, longer = 2 * reach, {}
        for i in terms:
            for j in terms:
                ways = [found[i, k] + found[k, j] for k in terms if (i, k) in found and (k, j) in found]
                if (i, j) not in found and ways:
                    longer[i, j] = sum(ways) / len(ways)
        found.update(longer)
    return found


@given(networks())
def test_terms_are_compared_where_they_meet_or_over_those_between_them(network):
    for matrix, compared in zip(met(network).tolist(), meetings.compare(met(network)), strict=True):
        expected = naive_compared(matrix)
        for i, row in enumerate(compared.tolist()):
            for j, value in enumerate(row):
                assert math.isnan(value) == ((i, j) not in expected)
                assert math.isnan(value) or value == pytest.approx(expected[i, j], abs=1e-9)


def ratios(network, reference):
    return meetings.ratios(met(network), reference, None)


@given(networks(), st.data())
@pytest.mark.parametrize("reference", [0, -1, "mean", "max"])
def test_a_factor_on_a_loss_divides_its_own_ratio_only(reference, network, data):
    """But for one that all terms that are joined have in common, which Adam does not see."""
    table, layer_of, layers = network
    terms = len(table[0])
    reference = terms - 1 if reference == -1 else reference
    scaled, factor = data.draw(st.integers(0, terms - 1)), 10.0 ** data.draw(st.integers(-4, 4))
    other = [[factor * n if i == scaled else n for i, n in enumerate(row)] for row in table], layer_of, layers
    before, after = ratios(network, reference), ratios(other, reference)
    assert torch.equal(before > 0, after > 0)
    change = after / before
    change[:, scaled] *= factor
    joined = meetings.compare(met(network)).isfinite()
    for layer in range(layers):
        for one in range(terms):
            group = change[layer][joined[layer, one]]
            torch.testing.assert_close(group, group[:1].expand_as(group), rtol=1e-9, atol=0)
            if one != scaled and reference == one:  # the anchor's own stays
                assert float(change[layer, one].nan_to_num(1)) == pytest.approx(1, rel=1e-9)


@given(networks())
def test_where_all_reach_all_it_is_the_ratio_of_the_layers_norms(network):
    table, layer_of, layers = network
    full = [[n or 1.0 for n in row] for row in table], layer_of, layers
    norms = tables(full)[0]
    torch.testing.assert_close(ratios(full, 0), torch.where(norms > 0, norms[:, :1] / norms, 0), rtol=1e-12, atol=0)
    means = torch.where(norms > 0, norms.log().mean(1, keepdim=True).exp() / norms, 0)
    torch.testing.assert_close(ratios(full, "mean"), means, rtol=1e-9, atol=0)
    most = torch.where(norms > 0, norms.amax(1, keepdim=True) / norms, 0)
    torch.testing.assert_close(ratios(full, "max"), most, rtol=1e-9, atol=0)


def test_a_long_chain_is_followed_to_its_end():
    """Eight terms of which each meets the next alone: each is twice as large as the one before, where they meet."""
    terms = 8
    matrix = torch.zeros(1, terms, terms, dtype=torch.float64)
    for i in range(terms):
        matrix[0, i, i] = 1.0
        for j in (i - 1, i + 1):
            if 0 <= j < terms:
                matrix[0, i, j] = 10.0 ** -min(i, j) * (2.0 if i > j else 1.0)
    expected = torch.tensor([[2.0**-i for i in range(terms)]], dtype=torch.float64)
    torch.testing.assert_close(meetings.ratios(matrix, 0, None), expected, rtol=1e-9, atol=0)


def test_terms_that_nothing_joins_are_left_as_they_are():
    matrix = torch.diag_embed(torch.tensor([[3.0, 0.5, 0.0]]))
    for reference in (0, 2, "mean", "max"):
        assert meetings.ratios(matrix, reference, None).tolist() == [[1.0, 1.0, 0.0]]


def test_a_term_without_influence_is_in_no_mean():
    matrix = torch.tensor([[[4.0, 4.0, 4.0], [1.0, 1.0, 1.0], [9.0, 9.0, 9.0]]], dtype=torch.float64)
    silent = torch.tensor([False, False, True])
    expected = torch.tensor([[0.5, 2.0, 2 / 9]], dtype=torch.float64)
    torch.testing.assert_close(meetings.ratios(matrix, "mean", silent), expected, rtol=1e-12, atol=0)
    expected = torch.tensor([[1.0, 4.0, 4 / 9]], dtype=torch.float64)
    torch.testing.assert_close(meetings.ratios(matrix, "max", silent), expected, rtol=1e-12, atol=0)


@given(st.lists(st.tuples(norm, norm), min_size=1, max_size=8), st.sampled_from([1, 2]), st.floats(0, 0.99))
def test_shares_are_averaged_as_norms_are(steps, power, beta3):
    """The share of a parameter is the mean of its shares, each counted as its norm counts in the average."""
    shares, count = torch.zeros(2, 1, dtype=torch.float64), 0
    mass, parts = 0.0, [0.0, 0.0]
    for pair in steps:
        whole = math.hypot(*pair)
        if not whole and not count:
            continue
        mass = beta3 * mass + (1 - beta3) * whole**power
        parts = [
            beta3 * p + (1 - beta3) * (whole**power * (n / whole) ** 2 if whole else 0)
            for p, n in zip(parts, pair, strict=True)
        ]
        new = mass ** (1 / power)
        row = [torch.tensor([[value]], dtype=torch.float64) for value in (new, whole, count, count + 1)]
        newest = meetings.newest_share(*row, (torch.tensor(beta3, dtype=torch.float64), power))
        observed = torch.tensor(pair, dtype=torch.float64)[:, None]
        shares = meetings.follow_shares(shares, observed, row[1].expand(2, 1), newest.expand(2, 1))
        count += 1
        if mass > 1e-200:
            expected = torch.tensor([p / mass for p in parts], dtype=torch.float64)[:, None]
            torch.testing.assert_close(shares, expected, rtol=1e-9, atol=1e-12)
