"""Backward passes beside the one that trains: the gradients of single losses, and nothing else."""

import pytest
import torch
from torch import nn

from lightning_mtadam.collect import Batch
from lightning_mtadam.extra_pass import ExtraPass
from tests.lightning_models import make_loader, make_network, three_losses

BATCHES = list(make_loader(2))


def by_hand(network, *batches):
    """The gradients of each loss, added up over the batches."""
    rows = {}
    for batch in batches:
        for name in ("fit", "size", "decay"):
            network.zero_grad()
            three_losses(network, batch)[name].backward()
            found = [None if one.grad is None else one.grad.clone() for one in network.parameters()]
            before = rows.get(name, [None] * len(found))
            rows[name] = [b if a is None else a if b is None else a + b for a, b in zip(before, found, strict=True)]
    network.zero_grad()
    return rows


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, gradients in expected.items():
        for one, other in zip(found[name], gradients, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_are_those_of_each_loss_added_up_over_the_batches(count):
    network, beside = make_network(), ExtraPass()
    for batch in BATCHES[:count]:
        beside.add(Batch(three_losses(network, batch), list(network.parameters())))
    assert_equal(beside.averaged(), by_hand(network, *BATCHES[:count]))


def test_a_factor_multiplies_and_the_loss_scale_in_it_does_not():
    network, beside, scale = make_network(), ExtraPass(), torch.tensor(64.0)
    losses = three_losses(network, BATCHES[0])
    beside.add(Batch(losses, list(network.parameters()), grad_output=scale / 4, loss_scale=scale))
    quarter = {n: [g if g is None else g / 4 for g in row] for n, row in by_hand(network, BATCHES[0]).items()}
    assert_equal(beside.averaged(), quarter)


def test_what_is_in_p_grad_stays_and_the_graph_can_be_used_again():
    network = make_network()
    kept = [torch.ones_like(one) for one in network.parameters()]
    for parameter, gradient in zip(network.parameters(), kept, strict=True):
        parameter.grad = gradient
    losses = three_losses(network, BATCHES[0])
    ExtraPass().add(Batch(losses, list(network.parameters())))
    assert all(parameter.grad is one for parameter, one in zip(network.parameters(), kept, strict=True))
    assert all(bool((one == 1).all()) for one in kept)
    sum(losses.values()).backward()


class Noisy(torch.autograd.Function):
    """A backward pass that draws a random number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.rand(())


def test_random_numbers_that_backward_passes_draw_are_drawn_again():
    w = nn.Parameter(torch.ones(2))
    loss = Noisy.apply(w).sum()
    before = torch.get_rng_state()
    ExtraPass().add(Batch({"a": loss, "b": w.sum()}, [w]))
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_of_parameters_are_silent_and_there_again_also_after_an_error():
    w, called = nn.Parameter(torch.ones(2)), []
    handle = w.register_hook(called.append)

    class Broken(Noisy):
        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("broken")

    ExtraPass().add(Batch({"a": w.sum(), "b": w.square().sum()}, [w]))
    with pytest.raises(RuntimeError, match="broken"):
        ExtraPass().add(Batch({"a": w.sum(), "b": Broken.apply(w).sum()}, [w]))
    assert not called
    w.sum().backward()
    assert len(called) == 1
    handle.remove()
    w.sum().backward()
    assert len(called) == 1


def test_a_loss_without_a_graph_has_no_gradients():
    w, beside = nn.Parameter(torch.ones(2)), ExtraPass()
    beside.add(Batch({"a": w.sum(), "zero": torch.zeros(())}, [w]))
    assert beside.averaged()["zero"] == [None]


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (torch.ones(()), ValueError, "has no graph"),
        (torch.ones(2), ValueError, "must be a scalar"),
        (1.0, TypeError, "tensor"),
    ],
)
def test_what_is_no_loss_is_refused(loss, error, match):
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=match):
        ExtraPass().add(Batch({"a": w.sum(), "b": loss}, [w]))
