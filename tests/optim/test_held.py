"""What MTAdam holds between backward and step can be looked at, and looking changes nothing."""

import pytest
import torch

from lightning_mtadam.optim.held import consumes_at_once, held_by
from tests.lightning_models import assert_same, assert_same_state, make_loader, make_mtadam, make_network, three_losses

BATCHES = list(make_loader(6))
OPTIONS = [
    {},
    {"layers": "module"},
    {"anchor": None},
    {"low_memory": True},
    {"balance_every": 2},
    {"denominator": "own"},
]


def trained(options, look):
    network = make_network()
    optimizer, found = make_mtadam(network, **options), []
    for batch in BATCHES:
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch))
        held = held_by(optimizer) if look else None
        optimizer.step()
        if held is not None:
            found.append(
                (held, dict(optimizer.scales()), list(optimizer._layer_names.layers(optimizer.param_groups).layer_of))
            )
    return network, optimizer, found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_to_look_changes_nothing_and_the_scales_are_those_of_the_step(options):
    network, optimizer, found = trained(options, look=True)
    other, plain, _ = trained(options, look=False)
    assert_same(network, other)
    assert_same_state(optimizer, plain)
    assert found
    for (gradients, scales), stepped, layer_of in found:
        assert bool(gradients) != consumes_at_once(optimizer)
        by_parameter = torch.stack([list(stepped.values())[layer] for layer in layer_of])
        torch.testing.assert_close(scales, by_parameter, rtol=1e-12, atol=0)


def test_the_gradients_are_those_of_the_losses_and_none_are_held_before_and_after():
    network = make_network()
    optimizer = make_mtadam(network)
    assert held_by(optimizer) is None
    losses = three_losses(network, BATCHES[0])
    expected = {
        name: torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
        for name, loss in losses.items()
    }
    optimizer.backward(losses)
    gradients, _ = held_by(optimizer)
    for name, row in expected.items():
        for one, other in zip(gradients[name], row, strict=True):
            assert one is other is None or torch.equal(one, other)
    optimizer.step()
    assert held_by(optimizer) is None


def test_of_a_light_step_nothing_is_held():
    network = make_network()
    optimizer = make_mtadam(network, balance_every=50)
    kinds = []
    for batch in BATCHES:
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch))
        kinds.append((optimizer._pending.light, held_by(optimizer) is None))
        optimizer.step()
    assert {(True, True), (False, False)} == set(kinds)
