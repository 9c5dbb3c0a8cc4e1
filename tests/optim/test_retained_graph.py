"""Several optimizers on one graph: each takes what a graph of its own would give it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_mtadam import MTAdam
from tests.lightning_models import (
    assert_same,
    assert_same_state,
    make_gan_parts,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
    total,
)

MODES = [{}, {"balance_every": 3}, {"low_memory": True}, {"terms": ("fit", "size")}]
in_every_mode = pytest.mark.parametrize("mode", MODES, ids=str)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")


def losses_of(network, batch):
    found = three_losses(network, batch)
    return {name: found[name] for name in ("fit", "size")}


def trained(make_first, make_second, *, shared, steps=6):
    """The first layer by one optimizer, the last by another; on one graph, or each on a graph of its own."""
    network = make_network()
    optimizers = make_first(network[0]), make_second(network[2])
    for batch in make_loader(steps):
        losses = losses_of(network, batch)
        for index, optimizer in enumerate(optimizers):
            optimizer.zero_grad()
            found = losses if shared else losses_of(network, batch)
            backward(optimizer, found, retain_graph=shared and index == 0)
        for optimizer in optimizers:
            optimizer.step()
    return network, optimizers


def backward(optimizer, losses, *, retain_graph):
    if isinstance(optimizer, MTAdam):
        optimizer.backward(losses, retain_graph=retain_graph)
    else:
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        total(losses).backward(inputs=own, retain_graph=retain_graph)


def adamw(network):
    return torch.optim.AdamW(network.parameters(), lr=1e-2)


@in_every_mode
def test_encoder_and_decoder_with_an_mtadam_each(mode):
    def make(part):
        return make_mtadam(part, **mode)

    shared, own = trained(make, make, shared=True), trained(make, make, shared=False)
    assert_same(shared[0], own[0])
    for one, other in zip(shared[1], own[1], strict=True):
        assert_same_state(one, other)


@pytest.mark.parametrize("pair", [(make_mtadam, adamw), (adamw, make_mtadam)])
def test_mtadam_beside_another_optimizer(pair):
    assert_same(trained(*pair, shared=True)[0], trained(*pair, shared=False)[0])


@needs_muon
@pytest.mark.parametrize("make_other", [adamw, lambda part: MTAdam(part, lr=1e-2)], ids=["AdamW", "MTAdam"])
@pytest.mark.parametrize("muon_first", [True, False])
def test_muon_for_the_matrices_beside_another_for_the_rest(make_other, muon_first):
    def run(shared):
        network = make_network()
        matrices = [parameter for parameter in network.parameters() if parameter.dim() == 2]
        rest = nn.ParameterList([parameter for parameter in network.parameters() if parameter.dim() != 2])
        muon = torch.optim.Muon(matrices, lr=1e-2)
        other = adamw(rest) if make_other is adamw else MTAdam(rest.parameters(), lr=1e-2)
        optimizers = [muon, other] if muon_first else [other, muon]
        for batch in make_loader():
            losses = losses_of(network, batch)
            for index, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                backward(optimizer, losses if shared else losses_of(network, batch), retain_graph=shared and not index)
            for optimizer in optimizers:
                optimizer.step()
        return network

    assert_same(run(True), run(False))


@pytest.mark.parametrize("make_optimizer", [make_mtadam, adamw])
def test_the_sides_of_a_gan_that_share_a_forward_pass(make_optimizer):
    def run(shared):
        generator, discriminator = make_gan_parts()
        sides = make_optimizer(generator), make_optimizer(discriminator)

        def losses(batch):
            x, y = batch
            fake = generator(x)
            real_score, fake_score = discriminator(y), discriminator(fake)
            return (
                {"l1": (fake - y).abs().mean(), "gan": F.softplus(-fake_score).mean()},
                {"real": F.softplus(-real_score).mean(), "fake": F.softplus(fake_score).mean()},
            )

        for batch in make_loader():
            together = losses(batch)
            for index, optimizer in enumerate(sides):
                optimizer.zero_grad()
                mine = together[index] if shared else losses(batch)[index]
                backward(optimizer, mine, retain_graph=shared and index == 0)
            for optimizer in sides:
                optimizer.step()
        return nn.ModuleList([generator, discriminator])

    assert_same(run(True), run(False))


@in_every_mode
def test_without_it_a_second_backward_pass_says_how_to_keep_the_graph_and_changes_nothing(mode):
    network = make_network()
    optimizer = make_mtadam(network, **mode)
    batches = iter(make_loader())
    optimizer.backward(losses_of(network, next(batches)))
    optimizer.step()
    optimizer.zero_grad()
    losses = losses_of(network, next(batches))
    total(losses).backward(inputs=list(network[2].parameters()))
    network.zero_grad()
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    state = {(p, key): value.clone() for p, one in optimizer.state.items() for key, value in one.items()}
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        optimizer.backward(losses)
    assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, optimizer.state[p][key]) for (p, key), value in state.items())
    assert all(parameter.grad is None for parameter in network.parameters())
    with pytest.raises(RuntimeError, match="nothing to consume"):
        optimizer.step()
    other = make_network()
    other.load_state_dict(network.state_dict())
    again = make_mtadam(other, **mode)
    again.load_state_dict(optimizer.state_dict())
    batch = next(batches)
    for one, mine in ((network, optimizer), (other, again)):
        mine.backward(losses_of(one, batch))
        mine.step()
    assert_same(network, other)


def test_a_step_between_two_backward_passes_on_one_graph_is_noticed():
    """As with every optimizer: what the second pass needs is gone."""
    network = make_network()
    first, second = make_mtadam(network[2]), make_mtadam(network[0])
    losses = losses_of(network, next(iter(make_loader())))
    first.backward(losses, retain_graph=True)
    first.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward(losses)


def test_a_retained_graph_counts_each_time():
    """Two passes over one graph add up, as two batches of a step do."""
    networks = make_network(), make_network()
    batch = next(iter(make_loader()))
    twice, once = map(make_mtadam, networks)
    losses = losses_of(networks[0], batch)
    twice.backward(losses, retain_graph=True)
    twice.backward(losses)
    once.backward({name: 2 * loss for name, loss in losses_of(networks[1], batch).items()})
    for optimizer in (twice, once):
        optimizer.step()
    assert_same(*networks)
    assert_same_state(twice, once)
