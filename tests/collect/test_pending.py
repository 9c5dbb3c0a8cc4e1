"""What backward has collected is held until it is consumed, added to, or dropped."""

import pytest
import torch
from torch import nn

from lightning_mtadam import layout
from lightning_mtadam.collect.batch import Batch
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.collect.pending import PendingGradients

TERMS = ("fit", "size")
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def losses_of(model, x=X, names=TERMS):
    """The second does not reach the second layer."""
    hidden = model[1](model[0](x))
    found = {"fit": model[2](hidden).square().mean(), "size": 30 * hidden.abs().mean()}
    return {name: found[name] for name in names}


def collected(model, *batches, memory=None, **options):
    """What is pending after these batches of losses."""
    parameters, pending = list(model.parameters()), PendingGradients()
    keys, trained = [0] * len(parameters), [p.requires_grad for p in parameters]
    pending.use(memory or GradientMemory(parameters, trained, keys, len(TERMS)), TERMS)
    for losses in batches:
        pending.add(Batch(losses, parameters, terms=TERMS, **options), TERMS)
    return pending


def expected(model, *batches):
    """By autograd alone: the sum of each term's gradients."""
    parameters, total = list(model.parameters()), {}
    for losses in batches:
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            kept = total.setdefault(name, [None] * len(parameters))
            for index, gradient in enumerate(found):
                if gradient is not None:
                    kept[index] = gradient if kept[index] is None else kept[index] + gradient
    return total


def assert_equal(found, theirs):
    assert found.keys() == theirs.keys()
    for name, gradients in found.items():
        for one, other in zip(gradients, theirs[name], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-16)


BATCHES = {
    "one": [TERMS],
    "two": [TERMS, TERMS],
    "a term comes later": [("fit",), TERMS],
    "a term is absent later": [TERMS, ("size",)],
    "one after the other": [("size",), ("fit",)],
}


@pytest.mark.parametrize("cached", [1, 7, 1 << 20])
@pytest.mark.parametrize("case", BATCHES)
def test_batches_add_up_by_term_however_they_are_cut_into_pieces(case, cached, monkeypatch):
    monkeypatch.setattr(layout, "CACHED", cached)
    model = network()
    batches = [(X * (1 + number), names) for number, names in enumerate(BATCHES[case])]
    pending = collected(model, *(losses_of(model, *batch) for batch in batches))
    assert_equal(pending.gradients, expected(model, *(losses_of(model, *batch) for batch in batches)))
    for name, gradients in pending.gradients.items():
        for norm, gradient in zip(pending.norms[name], gradients, strict=True):
            assert (norm is None) == (gradient is None)
            if norm is not None:
                torch.testing.assert_close(norm, torch.linalg.vector_norm(gradient), rtol=1e-14, atol=0)


def test_a_parameter_that_only_a_later_batch_reaches_starts_at_zero():
    """Whatever the memory held from the step before."""
    model = network()
    first = collected(model, {"size": sum(losses_of(model).values())})
    first.drop_gradients()
    parameters = list(model.parameters())
    hidden_only, whole = losses_of(model, X, ("size",)), losses_of(model, 2 * X)
    for losses in ({"size": hidden_only["size"]}, {"size": whole["size"] + whole["fit"]}):
        first.add(Batch(losses, parameters, terms=TERMS), TERMS)
    hidden_only, whole = losses_of(model, X, ("size",)), losses_of(model, 2 * X)
    assert_equal(
        first.gradients, expected(model, {"size": hidden_only["size"]}, {"size": whole["size"] + whole["fit"]})
    )


def test_gradients_are_views_into_the_memory_whose_other_places_hold_zeros():
    model = network()
    pending = collected(model, losses_of(model))
    memory = pending.memory
    for row, name in enumerate(TERMS):
        for gradient, view in zip(pending.gradients[name], memory.views[row], strict=True):
            assert gradient is None or gradient is view
    assert not memory.views[1][2].any()
    pending.drop_gradients()
    pending.add(Batch(losses_of(model, X, ("size",)), list(model.parameters()), terms=TERMS), TERMS)
    assert not any(view.any() for view in memory.views[0]), "what the step before left is gone"


@pytest.mark.parametrize("scale", [2.0**10, 2.0**-10])
def test_a_loss_scale_is_divided_out_of_the_gradients(scale):
    model = network()
    factor = torch.tensor(scale, dtype=torch.float64)
    pending = collected(model, losses_of(model), grad_output=factor / 2, loss_scale=factor)
    halves = {name: loss / 2 for name, loss in losses_of(model).items()}
    assert_equal(pending.gradients, expected(model, halves))


def test_what_no_term_reaches_is_not_touched():
    model = network()
    assert collected(model, losses_of(model, X, ("size",))).touched == [True, True, False, False]


def test_nothing_is_touched_where_nothing_is_pending():
    assert PendingGradients().touched == []


def test_what_is_pending_moves_to_another_memory():
    """As when a parameter group is added between two batches of a step."""
    model, head = network(), nn.Linear(2, 1).double()
    pending, parameters = collected(model, losses_of(model)), [*model.parameters(), *head.parameters()]
    pending.extend(2)
    assert [len(gradients) for gradients in pending.gradients.values()] == [6, 6]
    kept = {name: [None if g is None else g.clone() for g in found] for name, found in pending.gradients.items()}
    memory = GradientMemory(parameters, [True] * 6, [1] * 6, 2)
    pending.use(memory, TERMS)
    assert_equal(pending.gradients, kept)
    assert pending.gradients["fit"][0] is memory.views[0][0]
    pending.add(Batch({"fit": head(model(X)).mean()}, parameters, terms=TERMS), TERMS)
    assert pending.touched == [True] * 6


def test_a_term_that_fails_drops_all_that_was_pending():
    model = network()
    pending = collected(model, losses_of(model))
    elsewhere = {**losses_of(model), "size": nn.Linear(3, 1).double()(X).mean()}
    with pytest.raises(ValueError, match=r"losses\['size'\] reaches no parameter"):
        pending.add(Batch(elsewhere, list(model.parameters()), terms=TERMS), TERMS)
    assert (pending.gradients, pending.norms, pending.memory) == ({}, {}, None)


def test_clearing_forgets_all_but_the_memory():
    model = network()
    pending = collected(model, losses_of(model))
    pending.skip, pending.light = True, True
    memory = pending.memory
    pending.clear()
    assert pending == PendingGradients(memory=memory)
