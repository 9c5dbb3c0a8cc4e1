"""What is seen in the graphs of new losses, and gradients that arise within a backward pass."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mtadam import MTAdam
from lightning_mtadam.balancers import MetaBalance
from lightning_mtadam.graphs import look_at


def test_a_loss_through_a_reentrant_checkpoint_is_refused_wherever_it_lies_in_the_graph():
    body, x = nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True)
    inside = checkpoint(body, x, use_reentrant=True).square().mean() + body(x).mean()
    with pytest.raises(ValueError, match=r"losses\['deep'\] passes through reentrant .*use_reentrant=False"):
        look_at({"plain": body(x).mean(), "deep": inside.sin()}, set())


def test_other_graphs_are_let_through_and_so_are_losses_without_one():
    body, x, seen = nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True), {"plain"}
    kept = checkpoint(body, x, use_reentrant=False).mean()
    losses = {"plain": body(x).mean(), "kept": kept, "none": torch.tensor(1.0)}
    assert look_at(losses, seen) == []
    assert seen == set(losses)


def mtadam(model):
    optimizer = MTAdam(model.named_parameters(), lr=1e-2, terms=("fit", "late"))
    return optimizer.backward, optimizer


def meta_balance(model):
    balancer, optimizer = MetaBalance(terms=("fit", "late")), torch.optim.SGD(model.parameters(), lr=1e-2)
    return lambda losses: balancer.backward(losses, optimizer, model=model), optimizer


ROADS = pytest.mark.parametrize("road", [mtadam, meta_balance])


@ROADS
def test_a_term_that_begins_later_is_looked_at_when_it_comes(road):
    model, x = nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True)
    backward, optimizer = road(model)
    backward({"fit": model(x).square().mean()})
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"losses\['late'\] passes through reentrant"):
        backward({"fit": model(x).mean(), "late": checkpoint(model, x, use_reentrant=True).mean()})


class Offloaded(torch.autograd.Function):
    """Runs a layer again in its backward pass, as memory-saving layers do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x).detach()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.layer(x), gradient)
        return x.grad, None


class Net(nn.Module):
    def __init__(self, offloaded):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = (nn.Linear(4, 4).double() for _ in range(3))
        self.offloaded = offloaded

    def losses(self, x):
        hidden = self.first(x)
        hidden = Offloaded.apply(hidden, self.inner) if self.offloaded else self.inner(hidden)
        output = self.last(hidden.tanh())
        return {"fit": (output - 1).square().mean(), "late": 9 * output.abs().mean()}


@ROADS
@pytest.mark.parametrize("pieces", [1, 2])
def test_what_a_backward_pass_within_leaves_is_the_terms_gradient(road, pieces):
    plain, offloaded, x = Net(False), Net(True), torch.randn(6, 4, dtype=torch.float64)
    for model in (plain, offloaded):
        backward, optimizer = road(model)
        for _ in range(4):
            optimizer.zero_grad()
            for piece in x.chunk(pieces):
                backward(model.losses(piece))
            optimizer.step()
    assert bool(((offloaded.inner.weight - Net(True).inner.weight).abs() > 1e-4).all())
    for one, other in zip(plain.parameters(), offloaded.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


class Injected(torch.autograd.Function):
    """Lets the gradient of an auxiliary loss in, as Megatron does for its mixture of experts."""

    @staticmethod
    def forward(ctx, x, auxiliary):
        ctx.save_for_backward(auxiliary)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones_like(ctx.saved_tensors[0])


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, other):
        return x + other

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


@ROADS
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("function", [Injected, Same])
def test_a_gradient_that_no_loss_gives_is_warned_of_once(road, function, terms):
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    backward, optimizer = road(nn.ParameterList([w]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            h = function.apply(w, 100 * w.sum())
            losses = {"fit": h[0], "late": h[1]}
            optimizer.zero_grad()
            backward(dict(list(losses.items())[:terms]))
            optimizer.step()
    said = [str(one.message) for one in caught if "does not come from the loss" in str(one.message)]
    assert len(said) == (function is Injected and terms == 2)
    assert all("Return what it comes from as a term" in one for one in said)
