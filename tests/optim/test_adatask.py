"""MTAdam with ``anchor=None, denominator="own"`` is AdaTask."""

import numpy as np
import pytest
import torch

from lightning_mtadam import MTAdam
from tests.lightning_models import make_loader, make_network, three_losses
from tests.loops import take_step
from tests.oracles.naive_adatask import NaiveAdaTask


def output_gradients(network, batch):
    """The gradients of the two terms that reach every parameter."""
    losses = three_losses(network, batch)
    kept = {name: losses[name] for name in ("fit", "size")}
    parameters = list(network.parameters())
    return kept, {
        name: [g.numpy() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
        for name, loss in kept.items()
    }


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_without_an_anchor_and_with_own_denominators_it_is_adatask(betas):
    network = make_network()
    optimizer = MTAdam(network.parameters(), lr=1e-2, betas=(*betas, 0.9), anchor=None, denominator="own")
    oracle = NaiveAdaTask([p.detach().numpy() for p in network.parameters()], ("fit", "size"), 1e-2, betas)
    for batch in list(make_loader()) * 10:
        losses, gradients = output_gradients(network, batch)
        oracle.step(gradients)
        take_step(optimizer, losses)
    for ours, theirs in zip(network.parameters(), oracle.parameters, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=1e-12)


def test_the_denominator_of_all_terms_is_not_adatask():
    """The test above can fail."""
    network = make_network()
    optimizer = MTAdam(network.parameters(), lr=1e-2, anchor=None)
    oracle = NaiveAdaTask([p.detach().numpy() for p in network.parameters()], ("fit", "size"), 1e-2)
    for batch in make_loader():
        losses, gradients = output_gradients(network, batch)
        oracle.step(gradients)
        take_step(optimizer, losses)
    assert np.abs(network[0].weight.detach().numpy() - oracle.parameters[0]).max() > 1e-3
