"""SharedLayerBalancer against the closed form written anew, VQGAN's formula, and what made that one nan."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_mtadam.balancers import GradNorm, SharedLayerBalancer
from tests.balancers.gradients import TERMS, assert_close, shown
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import assert_equal_to_alone, fit_rank, rounds
from tests.lightning_models import (
    GAN,
    QUIET,
    adam,
    discriminator_losses,
    fit,
    generator_losses,
    half_precision,
    make_gan_parts,
    make_loader,
    make_network,
    sgd,
    three_losses,
)
from tests.loops import take_step
from tests.test_operation_counts import MultiTask, X, count, times

pytestmark = QUIET
BATCHES = list(make_loader(12))


def norm_at(parameters, loss):
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(g.square().sum()) for g in found if g is not None))


class Naive:
    """The weights by the formula, in Python's floats, one term at a time."""

    def __init__(self, anchor, decay, limit, importance):
        self.anchor, self.decay, self.limit, self.importance = anchor, decay, limit, importance
        self.history = {}

    def average(self, name):
        """The average of all norms of a term, the latest of which weighs the most; the weights sum to one."""
        seen = self.history.get(name, [])
        weights = [self.decay**age for age in range(len(seen))][::-1]
        return sum(w * n for w, n in zip(weights, seen, strict=True)) / sum(weights) if any(seen) else 0.0

    def weights(self, norms):
        for name, norm in norms.items():
            if norm > 0 or name in self.history:
                self.history.setdefault(name, []).append(norm)
        averages = {name: self.average(name) for name in TERMS}
        reached = {name: average for name, average in averages.items() if average > 0}
        mean = math.exp(sum(map(math.log, reached.values())) / len(reached))
        rules = {"mean": mean, "max": max(reached.values())}
        anchor = rules.get(self.anchor) or reached.get(TERMS[0] if self.anchor is None else self.anchor, mean)
        return {
            name: self.importance.get(name, 1.0) * (min(anchor / reached[name], self.limit) if name in reached else 1.0)
            for name in TERMS
        }


def late_and_absent(step, losses):
    gone = {"decay"} if step < 3 else {"size"} if step % 3 == 0 else {"fit"} if step % 4 == 1 else set()
    return {name: loss for name, loss in losses.items() if name not in gone}


@pytest.mark.parametrize("anchor", [None, "size", "mean", "max"])
@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("limit", [1e6, 2.0])
def test_weights_equal_the_closed_form(anchor, decay, limit):
    importance = {"size": 0.25}
    network, other = make_network(), make_network()
    balancer = SharedLayerBalancer("0", anchor, importance, decay, limit, terms=TERMS)
    naive = Naive(anchor, decay, limit, importance)
    optimizer, other_optimizer = sgd(network), sgd(other)
    for step, batch in enumerate(BATCHES):
        optimizer.zero_grad()
        balancer.backward(late_and_absent(step, three_losses(network, batch)), optimizer, model=network)
        optimizer.step()
        losses = late_and_absent(step, three_losses(other, batch))
        weights = naive.weights({name: norm_at(list(other[0].parameters()), loss) for name, loss in losses.items()})
        take_step(other_optimizer, {name: weights[name] * loss for name, loss in losses.items()})
        for name, weight in balancer.term_weights().items():
            assert float(weight) == pytest.approx(weights[name], rel=1e-10)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@given(st.sampled_from(["size", "decay"]), st.floats(-4, 4))
def test_a_factor_on_a_loss_other_than_the_anchor_changes_nothing(name, exponent):
    found = []
    for factor in (1.0, 10.0**exponent):
        network, balancer = make_network(), SharedLayerBalancer("0", limit=1e9)
        optimizer = sgd(network)
        for batch in BATCHES[:4]:
            losses = three_losses(network, batch)
            take = {**losses, name: factor * losses[name]}
            optimizer.zero_grad()
            balancer.backward(take, optimizer, model=network)
            optimizer.step()
        found.append([parameter.detach() for parameter in network.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_it_is_right_at_once(factor):
    """In the first step the gradient of every term at the layer is as long as the anchor's."""
    network, balancer = make_network(), SharedLayerBalancer("0")
    losses = three_losses(network, BATCHES[0])
    losses["size"] = factor * losses["size"]
    norms = {name: norm_at(list(network[0].parameters()), loss) for name, loss in losses.items()}
    shown(balancer, losses, network)
    for name, weight in balancer.term_weights().items():
        assert float(weight) * norms[name] == pytest.approx(norms["fit"], rel=1e-12)


def test_norms_and_balance_weights_are_those_of_the_layer():
    network, balancer = make_network(), SharedLayerBalancer("0", "size", decay=0.0)
    losses = three_losses(network, BATCHES[0])
    norms = [norm_at(list(network[0].parameters()), loss) for loss in losses.values()]
    shown(balancer, losses, network)
    expected = torch.tensor(norms, dtype=torch.float64)
    torch.testing.assert_close(balancer.gradient_norms()["0"], expected)
    torch.testing.assert_close(balancer.balance_weights()["0"], expected / norms[1])


def test_at_an_output_the_norms_of_the_samples_are_added_up():
    network, balancer = make_network(), SharedLayerBalancer("0", decay=0.0, at="output")
    balancer.attach(network)
    x, y = BATCHES[0]
    losses = three_losses(network, (x, y))
    shown(balancer, losses, network)
    feature = network[0](x).detach().requires_grad_()
    output = network[2](network[1](feature))
    again = {"fit": (output - y).square().mean(), "size": 300 * output.abs().mean()}
    norms = [torch.autograd.grad(loss, feature, retain_graph=True)[0].norm(dim=1).sum() for loss in again.values()]
    torch.testing.assert_close(balancer.gradient_norms()["0"], torch.stack([*norms, torch.zeros_like(norms[0])]))
    weights = balancer.term_weights()
    torch.testing.assert_close(weights["size"], norms[0] / norms[1])
    assert float(weights["decay"]) == 1  # it does not pass through the output


def test_a_step_of_two_batches_is_remembered_as_one():
    found = []
    for apart in (True, False):
        network, balancer = make_network(), SharedLayerBalancer("0")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)  # the weights of the first batch know it alone
        for pair in zip(BATCHES[::2], BATCHES[1::2], strict=True):
            optimizer.zero_grad()
            batches = pair if apart else [[torch.cat(tensors) for tensors in zip(*pair, strict=True)]]
            for batch in batches:
                share = torch.tensor(1 / len(batches), dtype=torch.float64)
                balancer.backward(three_losses(network, batch), optimizer, model=network, grad_output=share)
            optimizer.step()
        found.append(balancer.state)
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", [SharedLayerBalancer, GradNorm])
def test_the_layers_below_are_differentiated_once(kind):
    network = MultiTask()
    balancer, optimizer = kind("trunk.2"), torch.optim.Adam(network.parameters())
    balancer.backward(network(X), optimizer, model=network)  # the first time it is seen whether terms can be repeated
    losses = network(X)
    counts, _ = count(lambda: balancer.backward(losses, optimizer, model=network), network)
    assert counts == {
        ("trunk.0", "weight"): 1,
        ("trunk.2", "weight"): 1 + 3,  # the pass over the sum, and each of three terms
        ("trunk.2", "input"): 1,
        **times(1, {("depth", "weight"): 1, ("label", "weight"): 1}),
        **times(2, {("depth", "input"): 1, ("label", "input"): 1}),  # once more for their own terms
    }


# In place of VQGAN's formula


class VQGAN(GAN):
    """A generator with a codebook's loss of its own, and a discriminator that begins after three steps."""

    def __init__(self, make_optimizer=adam):
        super().__init__(make_optimizer)
        self.balancer = SharedLayerBalancer(
            "generator.2.weight", importance={"gan": 0.8}, decay=0.0, limit=1e4, terms=("l1", "gan", "code")
        )

    def training_step(self, batch, batch_idx):
        for optimizer, losses in zip(self.optimizers(), (self.generator_losses, discriminator_losses), strict=True):
            optimizer.zero_grad()
            found = losses(self.generator, self.discriminator, batch)
            self.backward_terms(found, optimizer, balanced=losses is not discriminator_losses)
            optimizer.step()

    def generator_losses(self, generator, discriminator, batch):
        return vqgan_losses(generator, discriminator, batch, begun=self.trainer.global_step >= 6)


def vqgan_losses(generator, discriminator, batch, begun):
    found = {**generator_losses(generator, discriminator, batch), "code": generator[0](batch[0]).square().mean()}
    return found if begun else {name: loss for name, loss in found.items() if name != "gan"}


def test_under_manual_optimization_it_is_vqgans_formula():
    module = VQGAN()
    fit(module, make_loader(), max_epochs=1)
    generator, discriminator = make_gan_parts()
    optimizers = [adam(generator), adam(discriminator)]
    for step, batch in enumerate(make_loader()):
        losses = vqgan_losses(generator, discriminator, batch, begun=step >= 3)
        if "gan" in losses:
            last = generator[2].weight
            l1, gan = (torch.autograd.grad(losses[name], last, retain_graph=True)[0] for name in ("l1", "gan"))
            losses["gan"] = 0.8 * torch.clamp(l1.norm() / gan.norm(), 0.0, 1e4).detach() * losses["gan"]
        take_step(optimizers[0], losses)
        take_step(optimizers[1], discriminator_losses(generator, discriminator, batch))
    for mine, theirs in ((module.generator, generator), (module.discriminator, discriminator)):
        for one, two in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_a_gradient_of_zero_makes_nothing_nan():
    network, balancer = make_network(), SharedLayerBalancer("0", decay=0.5)
    optimizer = sgd(network)
    for zero in ("size", "fit", "decay", "fit", "size"):
        losses = three_losses(network, BATCHES[0])
        losses[zero] = 0 * losses[zero]
        optimizer.zero_grad()
        balancer.backward(losses, optimizer, model=network)
        optimizer.step()
        assert all(bool(weight.isfinite()) for weight in balancer.term_weights().values())
    assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())


def test_a_step_whose_gradient_overflows_is_one_that_a_scaler_skips():
    """The weight would hide it: it is small where the gradient is large."""
    network = make_network(torch.float32)
    balancer, scale = SharedLayerBalancer("0"), torch.tensor(2.0**10)
    batch = next(iter(make_loader(1, torch.float32)))
    shown(balancer, three_losses(network, batch), network, grad_output=scale, loss_scale=scale)
    before = balancer.state_dict()["state"]
    losses = three_losses(network, batch)
    losses["size"] = 1e37 * losses["size"] * torch.tensor(1e-3)
    found = shown(balancer, losses, network, grad_output=scale, loss_scale=scale)
    assert not all(bool(gradient.isfinite().all()) for gradient in found)
    after = balancer.state_dict()["state"]
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_it_trains_in_half_precision_with_a_scaler():
    module = VQGAN()
    module.to(torch.float32)
    fit(module, make_loader(dtype=torch.float32), plugins=[half_precision(2.0**16)])
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    assert all(bool(weight.isfinite()) for weight in module.balancer.term_weights().values())


# Several processes


def gan_rank(rank):
    module = VQGAN()
    fit_rank(module, rank, rounds(2, 6, torch.float64), strategy={"find_unused_parameters": True})
    return [parameter.detach() for parameter in module.parameters()]


def test_two_ranks_of_a_gan_equal_one_process(tmp_path):
    assert_equal_to_alone(results(run_ranks(gan_rank, tmp_path)), VQGAN(), 6)


def astray_rank(rank):
    model = nn.parallel.DistributedDataParallel(make_network())
    balancer, optimizer = SharedLayerBalancer("0", "astray"), sgd(model)
    losses = three_losses(model.module, BATCHES[0], model)
    losses["astray"] = model.module[2].weight.square().sum()
    balancer.backward(losses, optimizer, model=model)


def test_every_rank_hears_of_an_anchor_that_does_not_reach_the_layer(tmp_path):
    assert all("'astray'] does not reach the shared" in found.error for found in run_ranks(astray_rank, tmp_path))


# Errors


def test_an_anchor_that_does_not_reach_the_layer_is_refused():
    network, balancer = make_network(), SharedLayerBalancer("2", "decay")
    with pytest.raises(ValueError, match=r"losses\['decay'\] does not reach the shared layer"):
        shown(balancer, three_losses(network, BATCHES[0]), network)
    assert balancer.state == {}
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_term_that_acts_elsewhere_keeps_its_importance():
    network, balancer = make_network(), SharedLayerBalancer("2", importance={"decay": 7.0})
    losses = three_losses(network, BATCHES[0])
    found = shown(balancer, losses, network)
    weights = balancer.term_weights()
    assert float(weights["decay"]) == 7
    network.zero_grad()
    sum(weights[name] * loss for name, loss in three_losses(network, BATCHES[0]).items()).backward()
    assert_close(found, [parameter.grad for parameter in network.parameters()], 1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 1.0}, ValueError, "decay must be at least 0 and below 1, but got 1.0"),
        ({"limit": 0.0}, ValueError, "limit must be above 0, but got 0.0"),
        ({"at": "input"}, ValueError, "at must be 'parameters' or 'output', but got 'input'"),
        ({"anchor": 3}, TypeError, "a term's name or None, but got 3"),
        ({"anchor": "unit"}, ValueError, "but got 'unit'"),
        ({"anchor": "c", "terms": ("a", "b")}, ValueError, r"one of the terms \('a', 'b'\), but got 'c'"),
        ({"importance": {"a": -1.0}}, ValueError, r"importance\['a'\] must be a finite number of at least 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SharedLayerBalancer("0", **options)


def test_an_unknown_layer_lists_near_matches():
    with pytest.raises(ValueError, match=r"shared='trunk.3' names no module or parameter of MultiTask"):
        shown(SharedLayerBalancer("trunk.3"), MultiTask()(X), MultiTask())
    with pytest.raises(ValueError, match=r"shared='trunk.3' names no module of MultiTask"):
        SharedLayerBalancer("trunk.3", at="output").attach(MultiTask())
