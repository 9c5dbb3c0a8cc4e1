"""Per-term gradients: one backward pass per term, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mtadam import MTAdam
from lightning_mtadam.collect.differentiate import term_gradients
from tests.loops import train

X = torch.arange(12.0).reshape(4, 3) / 10


def parts():
    torch.manual_seed(0)
    return nn.Linear(3, 3), nn.Linear(3, 2)


def losses(output):
    return {"fit": (output - 1).square().mean(), "size": output.abs().mean()}


def test_they_equal_one_backward_per_term_on_graphs_of_their_own():
    body, head = parts()
    parameters = [*body.parameters(), *head.parameters()]
    found = dict(term_gradients(losses(head(body(X))), parameters))
    for name in ("fit", "size"):
        losses(head(body(X)))[name].backward()
        for ours, parameter in zip(found[name], parameters, strict=True):
            assert torch.equal(ours, parameter.grad)
            parameter.grad = None


def test_they_write_no_grad_and_free_the_graph_with_the_last_term():
    body, head = parts()
    found = losses(head(body(X)))
    assert len(list(term_gradients(found, list(body.parameters())))) == 2
    assert body.weight.grad is None
    with pytest.raises(RuntimeError, match="second time"):
        found["size"].backward()


def test_grad_output_multiplies_every_term():
    body, head = parts()
    parameters = list(head.parameters())
    plain = dict(term_gradients(losses(head(body(X))), parameters))
    scaled = dict(term_gradients(losses(head(body(X))), parameters, grad_output=torch.tensor(8.0)))
    for name, gradients in plain.items():
        assert all(torch.equal(8 * g, s) for g, s in zip(gradients, scaled[name], strict=True))


def test_frozen_and_unreached_parameters_have_none():
    body, head = parts()
    body.bias.requires_grad_(False)
    unused = nn.Linear(1, 1)
    parameters = [*body.parameters(), *unused.parameters()]
    found = dict(term_gradients(losses(head(body(X))), parameters))
    assert [gradient is None for gradient in found["fit"]] == [False, True, True, True]


def trained_through(call, **options):
    """All parameters after three steps, in which ``call`` calls the first part."""
    body, head = parts()
    optimizer = MTAdam([*body.named_parameters("body"), *head.named_parameters("head")])
    train(optimizer, (losses(head(call(body, X.clone().requires_grad_(), **options))) for _ in range(3)))
    return torch.cat([p.detach().flatten() for p in (*body.parameters(), *head.parameters())])


def test_non_reentrant_checkpointing_changes_nothing():
    assert torch.equal(trained_through(lambda body, x: body(x)), trained_through(checkpoint, use_reentrant=False))


def test_reentrant_checkpointing_is_refused_naming_the_loss():
    with pytest.raises(ValueError, match=r"losses\['fit'\] passes through reentrant .*use_reentrant=False"):
        trained_through(checkpoint, use_reentrant=True)


class Scaling(torch.autograd.Function):
    """Multiplies by two; its backward works in place, on the gradient that it is given."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(2)


@pytest.mark.parametrize("grad_output", [None, torch.tensor(0.5, dtype=torch.float64)])
def test_a_backward_that_works_in_place_leaves_the_other_terms_alone(grad_output):
    """Three times in place: 2, 2 and 2 times the factor, not 2, 4 and 8 times."""
    w = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    found = dict(term_gradients({name: Scaling.apply(w) for name in "abc"}, [w], grad_output=grad_output))
    factor = 1 if grad_output is None else 0.5
    assert [gradient.item() for (gradient,) in found.values()] == [2 * factor] * 3
    assert grad_output is None or grad_output == 0.5


def test_a_graph_that_is_retained_gives_the_same_again():
    body, head = parts()
    found, parameters = losses(head(body(X))), [*body.parameters(), *head.parameters()]
    first = dict(term_gradients(found, parameters, retain_graph=True))
    again = dict(term_gradients(found, parameters))
    assert all(torch.equal(a, b) for name in found for a, b in zip(first[name], again[name], strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        next(term_gradients(found, parameters))
