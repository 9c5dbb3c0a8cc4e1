"""GradNorm against double backward, the naive loop, and its laws; what it costs, and the errors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mtadam.balancers import GradNorm
from lightning_mtadam.balancers import gradnorm_rule as rule
from tests.distributed.ranks import run_ranks
from tests.lightning_models import make_loader, make_network, three_losses
from tests.oracles.naive_gradnorm import NaiveGradNorm, gradient_loss, ratio_loss
from tests.test_operation_counts import MultiTask, X

TERMS = ("fit", "size", "decay")
BATCH = next(iter(make_loader(seed=7)))


def random_losses(network, x):
    """Four terms of the network, one of them tiny and one of them huge."""
    output = network(x)
    return [
        output.square().mean(),
        1e3 * output.abs().mean(),
        (output - 1).pow(4).mean(),
        1e-3 * output.logsumexp(1).square().mean(),
    ]


def random_terms(seed):
    """Four terms of a random network, as loss, mean and initial loss; its shared layer; and the norms there."""
    generator = torch.Generator().manual_seed(seed)
    width = int(torch.randint(2, 9, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 2))
    shared = list(network.double()[2].parameters())
    x, initial = (torch.randn(s, generator=generator).double() for s in ((7, 3), (4,)))
    losses = random_losses(network, x)
    terms = [(loss, float(loss.detach()), float(start)) for loss, start in zip(losses, initial.exp(), strict=True)]
    gradients = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    return terms, shared, torch.stack([torch.cat([g.flatten() for g in found]).norm() for found in gradients])


EVERYONE = torch.ones(4, dtype=torch.bool)


def rates_of(terms):
    means = torch.tensor([mean for _, mean, _ in terms], dtype=torch.float64)
    initial = torch.tensor([start for _, _, start in terms], dtype=torch.float64)
    return rule.training_rates(means, initial, EVERYONE)


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("seed", range(6))
def test_the_distances_are_the_gradient_of_the_squared_logarithms(alpha, seed):
    terms, shared, norms = random_terms(seed)
    logits = torch.randn(4, generator=torch.Generator().manual_seed(seed)).double()
    logs = (4 * torch.softmax(logits, 0)).log().requires_grad_()
    (expected,) = torch.autograd.grad(ratio_loss(logs.exp(), terms, shared, alpha), logs)
    found = rule.distances(logits, norms, rates_of(terms), alpha, EVERYONE)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 1.0])  # where the targets' mean is that of the norms, whatever the rates
@pytest.mark.parametrize("seed", range(6))
def test_the_distances_are_zero_where_the_papers_loss_is(alpha, seed):
    terms, shared, norms = random_terms(seed)
    rates = rates_of(terms)
    logits = (rates**alpha / norms).log()
    weights = rule.weights_of(logits)
    assert float(rule.distances(logits, norms, rates, alpha, EVERYONE).abs().max()) < 1e-12
    assert float(gradient_loss(weights, terms, shared, alpha).detach()) < 1e-12 * float((weights * norms).mean())


def test_a_term_without_a_gradient_or_a_target_has_no_part_in_it():
    norms = torch.tensor([1.0, 0.0, 3.0, 5.0], dtype=torch.float64)
    rates = torch.tensor([1.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    found = rule.distances(torch.zeros(4, dtype=torch.float64), norms, rates, 1.0, EVERYONE)
    half = torch.tensor(5 / 2, dtype=torch.float64).log() / 2
    torch.testing.assert_close(found, torch.stack([-half, 0 * half, 0 * half, half]))
    assert bool(rule.distances(norms, norms, rates, 0.0, EVERYONE).isfinite().all())


def all_terms(step, losses):
    return losses


def late_and_absent(step, losses):
    """The third term comes at the fourth step, the second stays away in every third."""
    gone = {"decay"} if step < 4 else {"size"} if step % 3 == 0 else set()
    return {name: loss for name, loss in losses.items() if name not in gone}


def now_and_then(step, losses):
    """The steps see a different term each."""
    return {TERMS[step % 3]: losses[TERMS[step % 3]]}


@pytest.mark.parametrize("choose", [all_terms, late_and_absent, now_and_then])
@pytest.mark.parametrize("initial", ["first", 3, {"fit": 2.0, "size": 40.0, "decay": 0.1}], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_trajectory_equals_the_naive_loop(choose, initial, accumulate, optimizer):
    ours, other = make_network(), make_network()
    balancer = GradNorm("0.weight", alpha=0.7, lr=0.05, initial_losses=initial, terms=TERMS)
    naive = NaiveGradNorm(TERMS, [other[0].weight], alpha=0.7, lr=0.05, initial=initial)
    stepper, other_stepper = (optimizer(network.parameters(), lr=1e-3) for network in (ours, other))
    batches = list(make_loader(24 * accumulate))
    share = torch.tensor(1 / accumulate, dtype=torch.float64)
    for step in range(24):
        chosen = batches[step * accumulate : (step + 1) * accumulate]
        stepper.zero_grad()
        for batch in chosen:
            balancer.backward(choose(step, three_losses(ours, batch)), stepper, model=ours, grad_output=share)
        stepper.step()
        naive.step([choose(step, three_losses(other, batch)) for batch in chosen], other_stepper)
        found = torch.stack(list(balancer.term_weights().values()))
        torch.testing.assert_close(found, naive.weights().detach(), rtol=0, atol=1e-10)
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


# The laws of the rule


def begin(terms, dtype=torch.float64):
    return rule.beginning(terms, None, dtype, torch.device("cpu"))


def test_at_alpha_0_weights_settle_where_they_are_proportional_to_the_inverse_norms():
    """The gradients are constant, of norms 1, 30, 0.02 and 5; the steps become smaller."""
    norms = torch.tensor([1.0, 30.0, 0.02, 5.0], dtype=torch.float64)
    observed = torch.stack([torch.ones_like(norms)] * rule.HEAD + [norms], 1)
    state = begin(4)
    for step in range(3000):
        state = rule.advance(state, observed, alpha=0.0, lr=0.1 * 0.997**step, start_length=1)
    expected = 4 / norms / (1 / norms).sum()
    torch.testing.assert_close(rule.weights_of(state["logits"]), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("factor", [1e-4, 1e4, 1e8])
@pytest.mark.parametrize("terms", [2, 3, 10])
def test_a_loss_that_is_off_by_orders_of_magnitude_is_brought_back_in_some_hundred_steps(factor, terms):
    norms = torch.ones(terms, dtype=torch.float64)
    norms[-1] = factor
    observed = torch.stack([torch.ones_like(norms)] * rule.HEAD + [norms], 1)
    state = begin(terms)
    for _ in range(350 if factor < 1e8 else 510):
        state = rule.advance(state, observed, alpha=1.5, lr=0.025, start_length=1)
    scaled = rule.weights_of(state["logits"]) * norms
    assert float(scaled.max() / scaled.min()) < 1.1


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_a_network_is_balanced_after_some_hundred_steps_of_a_loss_that_is_off(factor):
    network = make_network()
    balancer, optimizer = GradNorm("0", alpha=0.0), torch.optim.SGD(network.parameters(), lr=1e-5)
    for _ in range(400):
        losses = three_losses(network, BATCH)
        losses["size"] = factor * losses["size"]
        optimizer.zero_grad()
        balancer.backward(losses, optimizer, model=network)
        optimizer.step()
    losses = three_losses(network, BATCH)
    losses["size"] = factor * losses["size"]
    weights, norms = balancer.term_weights(), []
    for name, loss in losses.items():
        shared = list(network[0].parameters())
        found = torch.autograd.grad(weights[name] * loss, shared, retain_graph=True, allow_unused=True)
        norms.append(float(torch.cat([g.flatten() for g in found if g is not None]).norm()))
    assert max(norms) / min(norms) < 1.2


def test_weights_are_positive_and_sum_to_the_number_of_terms():
    """Over 10,000 steps, in single precision, of losses and gradients that jump by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    jumps = (3 * torch.randn(10_000, 5, rule.HEAD + 1, generator=generator)).exp()
    jumps[:, 3] *= 1e6
    jumps[:, :, 0] = torch.rand(10_000, 5, generator=generator) > 0.1  # presence
    state, weights = begin(5, torch.float32), []
    for observed in jumps:
        state = rule.advance(state, observed, alpha=1.5, lr=0.025, start_length=1)
        weights.append(rule.weights_of(state["logits"]))
    found = torch.stack(weights)
    assert bool((found > 0).all())
    assert float((found.sum(1) - 5).abs().max()) < 1e-5
    assert float(found[-1].max() / found[-1].min()) > 10  # they did move


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_step_that_is_not_finite_changes_nothing(value):
    observed = torch.rand(3, 6, dtype=torch.float64) + 1
    before = rule.advance(begin(3), observed, alpha=1.0, lr=0.1, start_length=1)
    observed[1, 4] = value
    after = rule.advance(before, observed, alpha=1.0, lr=0.1, start_length=1)
    assert all(torch.equal(after[key], before[key]) for key in before)


# What it does to the model


def started(steps=5, **options):
    """A network, a GradNorm that has balanced it for some steps, and the optimizer."""
    network = make_network()
    balancer, optimizer = GradNorm("0", **options), torch.optim.Adam(network.parameters(), lr=1e-2)
    for batch in make_loader(steps):
        optimizer.zero_grad()
        balancer.backward(three_losses(network, batch), optimizer, model=network)
        optimizer.step()
    return network, balancer, optimizer


def test_gradients_are_those_of_the_weighted_sum_and_of_nothing_else():
    network, balancer, optimizer = started()
    weights = balancer.term_weights()
    optimizer.zero_grad()
    losses = three_losses(network, BATCH)
    torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
    expected = [parameter.grad for parameter in network.parameters()]
    optimizer.zero_grad()
    balancer.backward(three_losses(network, BATCH), optimizer, model=network)
    assert all(torch.equal(p.grad, e) for p, e in zip(network.parameters(), expected, strict=True))


def test_a_loss_scale_changes_neither_the_weights_nor_the_initial_losses():
    network, balancer, optimizer = started()
    other, scale = copy.deepcopy(balancer), torch.tensor(2.0**12, dtype=torch.float64)
    balancer.backward(three_losses(network, BATCH), optimizer, model=network)
    optimizer.zero_grad()
    scaled = {"grad_output": scale, "loss_scale": scale}
    other.backward(three_losses(network, BATCH), optimizer, model=network, **scaled)
    assert all(torch.equal(value, other.state[key]) for key, value in balancer.state.items())


def test_average_weights_are_the_geometric_mean_of_those_that_were_used():
    network = make_network()
    balancer, optimizer = GradNorm("0", lr=0.3), torch.optim.Adam(network.parameters())
    used = [torch.ones(3, dtype=torch.float64)]
    for batch in make_loader(4):
        optimizer.zero_grad()
        balancer.backward(three_losses(network, batch), optimizer, model=network)
        optimizer.step()
        used.append(torch.stack(list(balancer.term_weights().values())))
    found = torch.cat(list(balancer.average_weights().values()))
    torch.testing.assert_close(found, torch.stack(used[:-1]).log().mean(0).exp())


# Fused losses, which write over what their backward pass needs


class KnownAhead(torch.autograd.Function):
    """The mean square; its gradient is made in the forward pass, and multiplied in place where nothing sees it."""

    @staticmethod
    def forward(ctx, output):
        ctx.gradient = 2 * output / output.numel()
        return output.square().mean()

    @staticmethod
    def backward(ctx, factor):
        return ctx.gradient.mul_(factor)


class Overwritten(torch.autograd.Function):
    """The mean square; the backward pass writes the gradient over the values that it is made of."""

    @staticmethod
    def forward(ctx, output):
        ctx.values = output.clone()
        return output.square().mean()

    @staticmethod
    def backward(ctx, factor):
        return ctx.values.mul_(2 * factor / ctx.values.numel())


def fused_losses(network, batch, square):
    output = network(batch[0])
    return {"fit": (output - batch[1]).abs().mean(), "size": square(output)}


def mean_square(output):
    return output.square().mean()


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_fused_loss_whose_gradient_is_multiplied_in_place_is_right(factor):
    found = []
    for square in (mean_square, KnownAhead.apply):
        network, balancer = make_network(), GradNorm("0")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for batch in make_loader(5):
            optimizer.zero_grad()
            share = torch.tensor(factor, dtype=torch.float64)
            balancer.backward(fused_losses(network, batch, square), optimizer, model=network, grad_output=share)
            optimizer.step()
        found.append([*network.parameters(), *balancer.state.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "square", [lambda output: 0.1 * KnownAhead.apply(output), Overwritten.apply], ids=["multiplied", "overwritten"]
)
def test_a_fused_loss_that_can_be_differentiated_once_only_is_refused_by_name(square):
    network = make_network()
    message = r"losses\['size'\] has another gradient each time it is differentiated"
    refuse(GradNorm("0"), fused_losses(network, BATCH, square), network, message)
    late = GradNorm("0", terms=("fit", "size"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    late.backward({"fit": fused_losses(network, BATCH, mean_square)["fit"]}, optimizer, model=network)
    optimizer.step()
    refuse(late, fused_losses(network, BATCH, square), network, message)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0, but got 0.0"),
        ({"alpha": -1.0}, "alpha must be at least 0, but got -1.0"),
        ({"initial_losses": 0}, "'first', a number of steps above 0 or a mapping of terms to losses, but got 0"),
        ({"initial_losses": "last"}, "but got 'last'"),
        ({"initial_losses": {"a": 0.0}}, r"initial_losses\['a'\] must be finite and above 0, but is 0.0"),
        ({"initial_losses": {"a": torch.inf}}, r"initial_losses\['a'\] must be finite and above 0, but is inf"),
        ({"initial_losses": {"a": 1.0}, "terms": ("a", "b")}, r"has the terms \('a',\), but terms are \('a', 'b'\)"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradNorm("0", **options)


def refuse(balancer, losses, network, message):
    """The losses are refused, and neither a gradient nor the balancer's state changes."""
    state, terms = dict(balancer.state), balancer.terms
    optimizer = torch.optim.Adam(network.parameters())
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=message):
        balancer.backward(losses, optimizer, model=network)
    assert balancer.terms == terms
    assert balancer.state.keys() == state.keys()
    assert all(balancer.state[key] is value for key, value in state.items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_an_unknown_layer_lists_near_matches():
    network = MultiTask()
    refuse(GradNorm("trunk.3"), network(X), network, r"shared='trunk.3' names no module or parameter of MultiTask.*'tr")
    refuse(GradNorm("labels"), network(X), network, r"Near matches: \['label'")


def test_a_frozen_layer_is_refused():
    network = MultiTask()
    network.trunk[2].requires_grad_(False)
    refuse(GradNorm("trunk.2"), network(X), network, "holds no parameter that requires a gradient")


def test_a_term_that_does_not_reach_the_layer_is_named():
    network, balancer, _ = started()
    losses = three_losses(network, BATCH) | {"decay": network[2].weight.square().sum()}  # the layer above
    refuse(balancer, losses, network, r"losses\['decay'\] does not reach the shared layer")


def test_losses_other_than_the_given_initial_ones_are_refused():
    network = make_network()
    balancer = GradNorm("0", initial_losses={"fit": 1.0, "size": 1.0})
    refuse(balancer, three_losses(network, BATCH), network, r"names the term 'decay', but the terms are \('fit', 'size")


@pytest.mark.parametrize("value", [0.0, -3.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_an_initial_loss_that_is_not_above_zero_is_named_once_it_is_known(value, steps):
    network = make_network()
    balancer = GradNorm("0", initial_losses=steps)
    optimizer = torch.optim.Adam(network.parameters())

    def losses():
        found = three_losses(network, BATCH)
        return found | {"size": found["size"] - found["size"].detach() + value}

    for _ in range(steps):
        optimizer.zero_grad()
        balancer.backward(losses(), optimizer, model=network)
        optimizer.step()
    assert all(bool(weight > 0) for weight in balancer.term_weights().values())
    refuse(balancer, losses(), network, f"The initial loss of the term 'size' is {value}, but GradNorm divides by it")


def test_the_initial_loss_is_that_of_all_batches_of_the_step():
    """A term may be zero in the first of them."""
    network = make_network()
    balancer, optimizer = GradNorm("0"), torch.optim.SGD(network.parameters(), lr=1e-3)
    half = torch.tensor(0.5, dtype=torch.float64)
    for number in range(4):
        losses = three_losses(network, BATCH)
        losses["decay"] = losses["decay"] * (number > 0)
        expected = losses["decay"].detach() / 2 if number == 1 else expected if number > 1 else None  # noqa: F821
        balancer.backward(losses, optimizer, model=network, grad_output=half)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert float(balancer.state["initial_losses"][2]) == pytest.approx(float(expected))


# Several processes


def train_rank(rank, wrong):
    """Two steps; the losses of rank 1 are as ``wrong`` says."""
    model = DistributedDataParallel(make_network(), find_unused_parameters=True)
    balancer, optimizer = GradNorm("0"), torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        losses = three_losses(model.module, BATCH)
        losses["fit"] = (model(BATCH[0]) - BATCH[1]).square().mean()
        losses |= wrong(rank, losses, model.module)
        balancer.backward(losses, optimizer, model=model)
        optimizer.step()
    return balancer.state_dict()["state"]


def zero_here(rank, losses, network):
    return {"size": losses["size"] * 0} if rank == 1 else {}


def zero_everywhere(rank, losses, network):
    return {"size": losses["size"] * 0}


def astray_here(rank, losses, network):
    return {"decay": network[2].weight.square().sum()} if rank == 1 else {}


def astray_everywhere(rank, losses, network):
    return {"decay": network[2].weight.square().sum()}


@pytest.mark.parametrize("odd", [zero_here, astray_here])
def test_what_is_odd_on_one_rank_only_is_no_error(odd, tmp_path):
    first, second = run_ranks(train_rank, tmp_path, odd)
    assert first.error is second.error is None
    assert all(torch.equal(value, second.result[key]) for key, value in first.result.items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (zero_everywhere, "initial loss of the term 'size' is 0.0"),
        (astray_everywhere, "'decay'] does not reach the shared"),
    ],
)
def test_every_rank_hears_of_losses_that_cannot_be_balanced(wrong, message, tmp_path):
    assert all(message in outcome.error for outcome in run_ranks(train_rank, tmp_path, wrong))


def test_the_weights_of_absent_terms_stay():
    generator = torch.Generator().manual_seed(0)
    state = begin(3)
    for step in range(30):
        observed = (2 * torch.randn(3, rule.HEAD + 4, generator=generator)).exp().double()
        if step > 5:
            observed[2] = 0
        before = rule.weights_of(state["logits"])
        state = rule.advance(state, observed, alpha=1.5, lr=0.1, start_length=1)
        after = rule.weights_of(state["logits"])
        torch.testing.assert_close(after.sum(), torch.tensor(3.0, dtype=after.dtype))
        if step > 5:
            torch.testing.assert_close(after[2], before[2])
            assert not torch.allclose(after[:2], before[:2])
