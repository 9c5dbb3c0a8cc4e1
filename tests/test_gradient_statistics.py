"""What is said of gradients, held to sums that are written out."""

import math

import pytest
import torch

from lightning_mtadam.gradient_statistics import (
    CONFLICT,
    DROWNED,
    conflicts,
    dead,
    drowned,
    gram_matrices,
    statistics_of,
    weights_of_update,
)

SHAPES = [(3, 2), (4,), (), (2, 1, 3)]
TERMS = ("a", "b", "c")
LAYER_OF = torch.tensor([0, 1, 1, 0])


def random_gradients(terms=3, seed=0, missing=()):
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES] for _ in range(terms)]
    return [[None if (i, p) in missing else one for p, one in enumerate(row)] for i, row in enumerate(rows)]


def flat(row, members):
    """The entries of some parameters as a list of numbers."""
    return [x for p in members for x in (torch.zeros(SHAPES[p]) if row[p] is None else row[p]).flatten().tolist()]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def length(a):
    return math.sqrt(dot(a, a))


def update_by_hand(gradients, weights):
    return [
        sum(
            float(weights[p, i]) * (torch.zeros(SHAPES[p]) if row[p] is None else row[p])
            for i, row in enumerate(gradients)
        )
        for p in range(len(SHAPES))
    ]


@pytest.mark.parametrize("missing", [(), ((0, 1), (2, 0))])
@pytest.mark.parametrize("members", [[0, 3], [1, 2], range(4)], ids=["layer 0", "layer 1", "network"])
def test_every_number_is_the_one_of_the_vectors_written_out(members, missing):
    gradients = random_gradients(missing=missing)
    weights = torch.rand(len(SHAPES), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 0.1
    every = statistics_of(gradients, weights)
    found = every.whole
    if len(members) < 4:
        layers = every.by_layer(LAYER_OF, 2)
        layer = int(LAYER_OF[members[0]])
        found = type(every)(layers.gram[layer], layers.parts[layer])
    vectors = [flat(row, members) for row in gradients]
    update = flat(update_by_hand(gradients, weights), members)
    parts = [flat(update_by_hand([row], weights[:, i : i + 1]), members) for i, row in enumerate(gradients)]
    assert found.norms.tolist() == pytest.approx([length(v) for v in vectors])
    assert float(found.update_norm) == pytest.approx(length(update))
    assert found.shares.tolist() == pytest.approx([dot(p, update) / dot(update, update) for p in parts])
    assert found.cosines_to_update.tolist() == pytest.approx(
        [dot(v, update) / length(v) / length(update) for v in vectors]
    )
    for row, v in zip(found.cosines.tolist(), vectors, strict=True):
        assert row == pytest.approx([dot(v, other) / length(v) / length(other) for other in vectors])
    mean = [sum(v[k] / length(v) for v in vectors) / 3 for k in range(len(update))]
    assert float(found.alignment) == pytest.approx(2 * dot(mean, mean) - 1)


def test_shares_add_up_to_one_in_every_layer_and_in_the_network():
    every = statistics_of(random_gradients(), torch.tensor([[1.0, 1e4, -3.0]]).expand(4, 3))
    for found in (every.whole, every, every.by_layer(LAYER_OF, 2)):
        torch.testing.assert_close(found.shares.sum(-1), torch.ones_like(found.update_norm))


def of(*vectors, weights=None):
    rows = [[torch.tensor(vector, dtype=torch.float64)] for vector in vectors]
    return statistics_of(rows, None if weights is None else torch.tensor([weights])).whole


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        (([2.0, 0.0], [5.0, 0.0]), 1.0),
        (([2.0, 0.0], [-5.0, 0.0]), -1.0),
        (([2.0, 0.0], [0.0, 1e-9]), 0.0),
        (([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]), 2 / 3 - 1),
        (([1.0, 0.0], [0.0, 0.0], [3.0, 0.0]), 1.0),  # a term without a gradient has no part in it
    ],
)
def test_alignment_is_what_its_words_say(vectors, expected):
    assert float(of(*vectors).alignment) == pytest.approx(expected)


def test_alignment_of_two_terms_is_their_cosine():
    found = of([1.0, 2.0], [-3.0, 1.0])
    assert float(found.alignment) == pytest.approx(float(found.cosines[0, 1])) == pytest.approx(-1 / math.sqrt(50))


def test_a_factor_on_a_loss_that_the_weights_undo_changes_nothing_but_its_norm():
    plain, factor = of([1.0, 2.0], [-3.0, 1.0]), 2.0**-60
    scaled = of([1.0, 2.0], [-3.0 * factor, factor], weights=[1.0, 1 / factor])
    for name in ("shares", "cosines", "cosines_to_update", "alignment", "update_norm"):
        torch.testing.assert_close(getattr(scaled, name), getattr(plain, name))
    assert scaled.norms[1] == plain.norms[1] * factor


def test_a_term_without_a_gradient_is_dead_and_has_no_cosine():
    found = of([1.0, 0.0], [0.0, 0.0])
    assert dead(found, ("a", "b")) == ("b",)
    assert drowned(found, ("a", "b")) == ()
    assert conflicts(found, ("a", "b")) == ()
    assert found.shares.tolist() == [1, 0]
    assert found.cosines[0].isnan().tolist() == [False, True]
    assert found.cosines_to_update.isnan().tolist() == [False, True]


def test_all_dead_is_nan_not_an_error():
    found = of([0.0], [0.0])
    assert found.shares.isnan().all()
    assert found.alignment.isnan()
    assert dead(found, ("a", "b")) == ("a", "b")
    assert not drowned(found, ("a", "b"))


@pytest.mark.parametrize(("share", "expected"), [(0.99, ("b",)), (1.01, ()), (-0.99, ("b",)), (-1.01, ())])
def test_a_term_is_drowned_below_its_share_whatever_the_sign(share, expected):
    share *= DROWNED
    found = of([1 - share], [share])
    assert float(found.shares[1]) == pytest.approx(share)
    assert drowned(found, ("a", "b")) == expected


def test_a_small_gradient_with_a_large_weight_is_not_drowned():
    assert drowned(of([1.0, 0.0], [0.0, 1e-6]), ("a", "b")) == ("b",)
    assert drowned(of([1.0, 0.0], [0.0, 1e-6], weights=[1.0, 1e6]), ("a", "b")) == ()


def test_conflicts_are_the_pairs_below_the_threshold_worst_first():
    angle = math.acos(CONFLICT)
    nearly = [math.cos(angle - 0.01), math.sin(angle - 0.01)]
    beyond = [math.cos(angle + 0.01), math.sin(angle + 0.01)]
    assert conflicts(of([1.0, 0.0], nearly), ("a", "b")) == ()
    ((one, other, cosine),) = conflicts(of([1.0, 0.0], beyond), ("a", "b"))
    assert (one, other) == ("a", "b")
    assert cosine == pytest.approx(beyond[0])
    found = conflicts(of([1.0, 0.0], [-1.0, 1.0], [-1.0, 0.0]), TERMS)
    assert [pair[:2] for pair in found] == [("a", "c"), ("a", "b")]


def test_an_update_that_is_zero_has_no_shares_and_drowns_nobody():
    found = of([1.0, 0.0], [-1.0, 0.0])
    assert found.shares.isnan().all()
    assert drowned(found, ("a", "b")) == ()
    assert conflicts(found, ("a", "b")) == (("a", "b", -1.0),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_gradients_are_multiplied_in_float64(dtype):
    gradients = [[torch.full((300_000,), 1e-3, dtype=dtype)], [torch.full((300_000,), 3.0, dtype=dtype)]]
    values = [float(row[0][0]) for row in gradients]
    expected = [[300_000 * a * b for a in values] for b in values]
    torch.testing.assert_close(gram_matrices(gradients)[0], torch.tensor(expected, dtype=torch.float64))


def test_a_large_parameter_is_the_sum_of_its_pieces(monkeypatch):
    gradients = random_gradients()
    whole = gram_matrices(gradients)
    monkeypatch.setattr("lightning_mtadam.gradient_statistics.PIECE", 4)
    torch.testing.assert_close(gram_matrices(gradients), whole)


def test_gradients_that_are_not_finite_are_noticed():
    assert of([1.0], [2.0]).finite
    assert not of([1.0], [math.inf]).finite
    assert not of([1.0], [math.nan]).finite


# The weights of an update


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1e-6, 1, 1e6)])
def test_weights_of_losses_are_found_in_the_update(sizes):
    gradients = [[size * one for one in row] for size, row in zip(sizes, random_gradients(), strict=True)]
    expected = torch.tensor([[2.0, -0.5, 1e-3]], dtype=torch.float64).expand(4, 3)
    update = update_by_hand(gradients, expected)
    torch.testing.assert_close(weights_of_update(gram_matrices([*gradients, update])), expected, rtol=1e-6, atol=0)


def test_weights_that_differ_by_layer_are_found_where_gradients_are_independent():
    gradients = [row[:2] for row in random_gradients()]  # of 6 and of 4 entries
    expected = torch.tensor([[1.0, 2.0, 3.0], [30.0, 0.0, -1.0]], dtype=torch.float64)
    update = [sum(expected[p, i] * row[p] for i, row in enumerate(gradients)) for p in range(2)]
    torch.testing.assert_close(weights_of_update(gram_matrices([*gradients, update])), expected)


def test_terms_with_the_same_gradient_are_treated_alike_and_a_dead_one_gets_nothing():
    one, none = torch.tensor([1.0, 2.0]), torch.zeros(2)
    weights = weights_of_update(gram_matrices([[one], [one], [none], [4 * one]]))
    torch.testing.assert_close(weights, torch.tensor([[2.0, 2.0, 0.0]], dtype=torch.float64))


def test_what_no_term_explains_is_no_part_of_the_shares():
    gram = gram_matrices([[torch.tensor([1.0, 0.0])], [torch.tensor([3.0, 7.0])]])  # a term, and an update
    torch.testing.assert_close(weights_of_update(gram), torch.tensor([[3.0]], dtype=torch.float64))
