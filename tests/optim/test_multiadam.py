"""MTAdam with ``anchor=None, denominator="own", update="mean"`` is MultiAdam."""

import numpy as np
import pytest
import torch

from lightning_mtadam import MTAdam
from tests.lightning_models import largest_difference, make_loader, make_network, three_losses
from tests.loops import take_step
from tests.oracles.naive_multiadam import NaiveMultiAdam

GROUPS = ("fit", "size")


def gradients_of(network, losses):
    parameters = list(network.parameters())
    return {
        name: [g.numpy() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
        for name, loss in losses.items()
    }


def of_the_output(network, batch, **factors):
    """The two terms that reach every parameter."""
    losses = three_losses(network, batch)
    return {name: factors.get(name, 1.0) * losses[name] for name in GROUPS}


def multiadam(network, betas, **options):
    return MTAdam(
        network.parameters(),
        **{"lr": 1e-2, "anchor": None, "denominator": "own", "update": "mean", **options},
        betas=(*betas, 0.9),
    )


@pytest.mark.parametrize("betas", [(0.99, 0.99), (0.9, 0.999)])
def test_it_equals_a_naive_multiadam(betas):
    network = make_network()
    optimizer = multiadam(network, betas)
    oracle = NaiveMultiAdam([p.detach().numpy() for p in network.parameters()], GROUPS, 1e-2, betas)
    for batch in list(make_loader()) * 10:
        losses = of_the_output(network, batch)
        oracle.step(gradients_of(network, losses))
        take_step(optimizer, losses)
    for ours, theirs in zip(network.parameters(), oracle.parameters, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"update": "sum"}, {"denominator": "max"}, {"anchor": "first"}], ids=str)
def test_another_option_is_not_multiadam(options):
    """The test above can fail."""
    network = make_network()
    optimizer = multiadam(network, (0.99, 0.99), **options)
    oracle = NaiveMultiAdam([p.detach().numpy() for p in network.parameters()], GROUPS, 1e-2)
    for batch in make_loader():
        losses = of_the_output(network, batch)
        oracle.step(gradients_of(network, losses))
        take_step(optimizer, losses)
    assert np.abs(network[0].weight.detach().numpy() - oracle.parameters[0]).max() > 1e-3


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("name", GROUPS)
def test_a_factor_on_any_loss_changes_nothing(name, factor):
    networks = make_network(), make_network()
    for network, factors in zip(networks, ({}, {name: factor}), strict=True):
        optimizer = multiadam(network, (0.99, 0.99), eps=1e-30)
        for batch in make_loader():
            take_step(optimizer, of_the_output(network, batch, **factors))
    assert largest_difference(*networks) < 1e-10
