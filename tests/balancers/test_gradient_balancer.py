"""What holds for balancers that collect the gradient of every term."""

import copy
import pickle

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_mtadam import NonFiniteError
from lightning_mtadam.balancers import MetaBalance, TorchJDBalancer
from tests.balancers.gradients import TwoHeads, assert_close, sgd, shown
from tests.distributed.ranks import results, run_ranks
from tests.lightning_models import assert_same, make_loader, make_network, three_losses


def total(matrix):
    return matrix.sum(0)


BALANCERS = {"metabalance": MetaBalance, "torchjd": lambda: TorchJDBalancer(total)}
every_balancer = pytest.mark.parametrize("make", BALANCERS.values(), ids=BALANCERS)
BATCHES = list(make_loader(4))


def after_some_steps(make, model, losses, steps=3):
    balancer, optimizer = make(), sgd(model)
    for batch in BATCHES[:steps]:
        optimizer.zero_grad()
        balancer.backward(losses(model, batch), optimizer, model=model)
        optimizer.step()
    return balancer


def bent(network, batch):
    """The root of zero makes the gradient of "size" at the last bias nan, though the loss is finite."""
    losses = three_losses(network, batch)
    return {**losses, "size": losses["size"] + (network[2].bias - network[2].bias.detach()).square().sum().sqrt()}


@every_balancer
def test_a_gradient_that_is_not_finite_names_term_and_layer_and_changes_nothing(make):
    network = make_network()
    balancer = after_some_steps(make, network, three_losses)
    state = balancer.state_dict()
    with pytest.raises(NonFiniteError, match=r"term 'size' at the layer '2.bias' is not finite"):
        shown(balancer, bent(network, BATCHES[3]), network)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state["state"][key]) for key, value in balancer.state_dict()["state"].items())


@every_balancer
def test_a_failing_batch_drops_the_whole_step(make):
    network = make_network()
    balancer = after_some_steps(make, network, three_losses)
    other, optimizer = copy.deepcopy(balancer), sgd(network)
    state = balancer.state_dict()["state"]
    optimizer.zero_grad()
    balancer.backward(three_losses(network, BATCHES[1]), optimizer, model=network)
    with pytest.raises(NonFiniteError):
        balancer.backward(bent(network, BATCHES[3]), optimizer, model=network)
    assert all(torch.equal(value, state[key]) for key, value in balancer.state_dict()["state"].items())
    balancer.backward(three_losses(network, BATCHES[2]), optimizer, model=network)
    found = [parameter.grad for parameter in network.parameters()]
    assert_close(found, shown(other, three_losses(network, BATCHES[2]), network), 0)


@every_balancer
def test_under_a_loss_scale_a_step_that_is_not_finite_shows_it_and_leaves_the_state(make):
    network, scale = make_network(), torch.tensor(64.0)
    balancer = after_some_steps(make, network, three_losses)
    state = balancer.state_dict()["state"]
    found = shown(balancer, bent(network, BATCHES[3]), network, grad_output=scale, loss_scale=scale)
    assert not all(bool(gradient.isfinite().all()) for gradient in found)
    assert all(torch.equal(value, state[key]) for key, value in balancer.state_dict()["state"].items())


@every_balancer
def test_a_loss_scale_multiplies_the_gradient_and_nothing_else(make):
    network, scale = make_network(), torch.tensor(64.0)
    plain = after_some_steps(make, network, three_losses)
    scaled = copy.deepcopy(plain)
    expected = shown(plain, three_losses(network, BATCHES[3]), network)
    found = shown(scaled, three_losses(network, BATCHES[3]), network, grad_output=scale, loss_scale=scale)
    assert_close(found, [64 * gradient for gradient in expected], 1e-14)
    for key, value in plain.state_dict()["state"].items():
        assert torch.allclose(value, scaled.state_dict()["state"][key], rtol=1e-14)


@every_balancer
def test_autocast_around_the_backward_pass_changes_nothing(make):
    """Manual optimization under mixed precision runs it there."""
    network = make_network()
    losses = three_losses(network, BATCHES[0])
    expected = shown(make(), losses, network)
    losses = three_losses(network, BATCHES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(shown(make(), losses, network), expected, 0)


@every_balancer
def test_parameters_that_no_term_reaches_get_no_gradient(make):
    model = TwoHeads()
    found = shown(make(), {"first": model.losses(BATCHES[0][0])["first"]}, model)
    reached = {
        name for (name, _), gradient in zip(model.named_parameters(), found, strict=True) if gradient is not None
    }
    assert reached == {"trunk.0.weight", "trunk.0.bias", "first.weight", "first.bias"}


@every_balancer
def test_a_pickled_balancer_goes_on_bitwise(make):
    network = make_network()
    balancer = after_some_steps(make, network, three_losses)
    other = pickle.loads(pickle.dumps(balancer))
    losses = three_losses(network, BATCHES[3])
    expected = shown(balancer, losses, network)
    assert_close(shown(other, three_losses(network, BATCHES[3]), network), expected, 0)


def accumulated_rank(rank, make):
    """Two batches a step, of which only the second is averaged; rank 1 has a term without a graph in each first."""
    model = DistributedDataParallel(TwoHeads())
    balancer, optimizer, half = make(), sgd(model), torch.tensor(0.5)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            model.require_backward_grad_sync = part == 1
            losses = model.module.losses(BATCHES[(2 * step + part + rank) % 4][0])
            if part == 0 and rank == 1:
                losses["second"] = torch.zeros((), dtype=torch.float64)
            balancer.backward(losses, optimizer, model=model, grad_output=half)
        optimizer.step()
    return model.module, balancer.state_dict()["state"]


def accumulated_alone(make):
    model = TwoHeads()
    balancer, optimizer = make(), sgd(model)
    for step in range(3):
        of_ranks = []
        for rank in range(2):
            for part in range(2):
                losses = model.losses(BATCHES[(2 * step + part + rank) % 4][0])
                if part == 0 and rank == 1:
                    losses["second"] = 0 * losses["second"]
                of_ranks.append(losses)
        optimizer.zero_grad()
        means = {name: torch.stack([losses[name] for losses in of_ranks]).mean() for name in of_ranks[0]}
        balancer.backward(means, optimizer, model=model)
        optimizer.step()
    return model


@every_balancer
def test_a_rank_may_have_a_term_without_a_graph(make, tmp_path):
    (first, state), (second, other) = results(run_ranks(accumulated_rank, tmp_path, make))
    assert_same(first, second)
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    alone = accumulated_alone(make)
    for found, expected in zip(first.parameters(), alone.parameters(), strict=True):
        assert float((found - expected).detach().abs().max()) < 1e-12


def failing_rank(rank):
    model = DistributedDataParallel(TwoHeads())
    losses = model.module.losses(BATCHES[rank][0])
    bias = model.module.second.bias
    if rank == 1:
        losses["second"] = losses["second"] + (bias - bias.detach()).square().sum().sqrt()
    MetaBalance().backward(losses, sgd(model), model=model)


def test_all_ranks_raise_where_the_gradient_of_one_is_not_finite(tmp_path):
    for outcome in run_ranks(failing_rank, tmp_path):
        assert "NonFiniteError: The gradient of the term 'second' at the layer 'second.bias'" in outcome.error
