"""OutputBalancer against a naive oracle on explicit gradients of the outputs, and what it refuses."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from lightning_mtadam.balancers import GradNorm, OutputBalancer
from tests.balancers.cases import CASES, Balanced, Case, balanced_by_hand, output_losses
from tests.distributed.ranks import run_ranks
from tests.distributed.training import fit_rank, rounds
from tests.lightning_models import (
    GAN,
    QUIET,
    fit,
    generator_losses,
    half_precision,
    largest_difference,
    make_gan_parts,
    make_loader,
    make_network,
)
from tests.oracles.naive_output_balancer import NaiveOutputBalancer

pytestmark = QUIET
WEIGHTS = {"fit": 5.0, "size": 1.0, "bend": 2.0}


def attached(network, **options):
    """A balancer for the last layer of a network, and an optimizer that only shows the gradient."""
    balancer = OutputBalancer("2", **options)
    balancer.attach(network)
    return balancer, torch.optim.SGD(network.parameters(), lr=0.1)


def losses_of(outputs, batch):
    """Terms of one or two outputs; "size" of the last one alone."""
    y = batch[1]
    return {
        "fit": sum((output - y).square().mean() for output in outputs),
        "size": 300 * outputs[-1].abs().mean(),
        "bend": 1e-3 * sum(output.pow(4).mean() for output in outputs),
    }


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("calls", [1, 2])
def test_gradients_equal_the_naive_balance_of_explicit_gradients_at_the_output(calls, weights):
    network = make_network()
    balancer, optimizer = attached(network, weights=weights, ema_decay=0.8)
    naive_network = make_network()
    oracle = NaiveOutputBalancer(weights or dict.fromkeys(WEIGHTS, 1.0), 0.8)
    for step, batch in enumerate(make_loader(20)):
        inputs = [batch[0], batch[0].square()][:calls]
        absent = {"bend"} if step % 5 == 3 else set()
        losses = losses_of([network(x) for x in inputs], batch)
        optimizer.zero_grad()
        balancer.backward({n: loss for n, loss in losses.items() if n not in absent}, optimizer, model=network)

        outputs = [naive_network(x) for x in inputs]
        naive = {n: loss for n, loss in losses_of(outputs, batch).items() if n not in absent}
        gradients = {
            name: [
                g.detach().numpy()
                for g in torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
            ]
            for name, loss in naive.items()
        }
        combined = [torch.from_numpy(found) for found in oracle.combine(gradients)]
        expected = torch.autograd.grad(outputs, list(naive_network.parameters()), combined)
        for parameter, gradient in zip(network.parameters(), expected, strict=True):
            assert torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-13)
        optimizer.step()
        naive_network.load_state_dict(network.state_dict())


def test_a_constant_factor_on_a_loss_changes_nothing():
    def scaled(network, batch):
        losses = output_losses(network, batch)
        return {**losses, "size": 1e6 * losses["size"]}

    plain = balanced_by_hand(CASES["output"], make_loader(20))
    other = balanced_by_hand(Case(CASES["output"].make, scaled), make_loader(20))
    assert largest_difference(plain, other) < 1e-12


def test_the_gradient_does_not_depend_on_the_batch_size():
    found = []
    for copies in (1, 3):
        network = make_network()
        balancer, optimizer = attached(network)
        x, y = (tensor.repeat(copies, 1) for tensor in next(iter(make_loader())))
        balancer.backward(output_losses(network, (x, y)), optimizer, model=network)
        found.append(network[0].weight.grad)
    assert torch.allclose(*found, rtol=1e-12)


def test_the_average_moves_once_a_step_as_if_accumulated_batches_were_one():
    apart = balanced_by_hand(CASES["output"], list(make_loader(2)), accumulate=2)
    joined = balanced_by_hand(CASES["output"], make_joined(2))
    for key, value in apart.balancer.state_dict()["state"].items():
        assert torch.allclose(value, joined.balancer.state_dict()["state"][key], rtol=1e-12), key


def make_joined(count):
    return [[torch.cat(tensors) for tensors in zip(*make_loader(count), strict=True)]]


def test_norms_are_those_of_unscaled_gradients():
    scaled, plain = (Balanced(CASES["output"], torch.float32) for _ in range(2))
    fit(scaled, make_loader(dtype=torch.float32), max_epochs=1, plugins=half_precision(64.0))
    fit(plain, make_loader(dtype=torch.float32), max_epochs=1)
    ours, expected = (module.balancer.state_dict()["state"]["norms"] for module in (scaled, plain))
    assert torch.allclose(ours, expected, rtol=0.02)


def test_a_step_that_the_scaler_skips_moves_no_average():
    module = Balanced(CASES["output"], torch.float32)
    fit(module, make_loader(dtype=torch.float32), limit_train_batches=1, max_epochs=1, plugins=half_precision(1e38))
    assert not module.balancer.state_dict()["state"]["counts"].any()
    assert torch.equal(module.network[0].weight, make_network(torch.float32)[0].weight)


class BalancedGAN(GAN):
    """The generator's terms are balanced at its output; the discriminator trains on the plain sum."""

    def configure_balancer(self):
        return OutputBalancer("generator")

    def configure_optimizers(self):
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in (self.generator, self.discriminator)]

    def training_step(self, batch, batch_idx):
        optimizer, _ = self.optimizers()
        losses = generator_losses(self.generator, self.discriminator, batch)
        optimizer.zero_grad()
        self.backward_terms(losses, optimizer)
        assert all(parameter.grad is None for parameter in self.discriminator.parameters())
        optimizer.step()


def test_the_network_of_another_optimizer_may_lie_behind_the_output():
    module = BalancedGAN()
    fit(module, make_loader(), max_epochs=1)
    assert largest_difference(module.generator, make_gan_parts()[0]) > 1e-4


class Head(nn.Module):
    """Its losses can pass by the output of "body"."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 2), nn.Linear(2, 1)
        self.pair = nn.LSTM(3, 2)


def refused(make_losses, output="body"):
    model = Head()
    balancer = OutputBalancer(output)
    balancer.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    try:
        balancer.backward(make_losses(model, torch.ones(4, 3)), optimizer, model=model)
    finally:
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not balancer.state_dict()["state"]
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


REFUSED = {
    "not through the output": (
        lambda model, x: {"good": model.body(x).sum(), "bad": (3 * x).requires_grad_().sum()},
        r"losses\['bad'\] does not derive from the output of 'body'.* Name the module",
    ),
    "detached": (
        lambda model, x: {"good": model.body(x).sum(), "bad": model.body(x).detach().requires_grad_().sum()},
        r"losses\['bad'\] does not derive from the output of 'body'",
    ),
    "past the output": (
        lambda model, x: {"good": model.body(x).sum(), "bad": model.body(x).sum() + model.body.weight.square().sum()},
        r"losses\['bad'\] reaches trained parameters \(of the shapes \(2, 3\)\) without passing the output of 'body'",
    ),
    "behind the output": (
        lambda model, x: {"good": model.body(x).sum(), "bad": model.head(model.body(x)).sum()},
        r"losses\['bad'\] reaches trained parameters .* give the optimizer only what lies before the output",
    ),
    "again": (
        lambda model, x: (lambda y: {"good": y.sum(), "bad": model.body(y @ torch.ones(2, 3)).sum()})(model.body(x)),
        r"An output of 'body' goes into 'body' again.* \.detach\(\)",
    ),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_balanced_at_the_output_is_refused_and_changes_nothing(wrong):
    make_losses, message = REFUSED[wrong]
    with pytest.raises(ValueError, match=message):
        refused(make_losses)


def test_an_output_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"output='pair' .* LSTM returns a tuple\. Name the layer"):
        refused(lambda model, x: {"any": model.pair(x)[0].sum()}, output="pair")


def test_an_unknown_output_lists_near_matches():
    with pytest.raises(ValueError, match=r"output='bodi' names no module of Head\. Near matches: \['body'\]"):
        OutputBalancer("bodi").attach(Head())


OPTIONS = {
    "decay": ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1, but got 1.0"),
    "weight": ({"weights": {"fit": 0.0}}, r"weights\['fit'\] must be finite and above 0, but is 0.0"),
    "terms": ({"weights": {"fit": 1.0}, "terms": ("fit", "size")}, "Give one for each"),
}


@pytest.mark.parametrize("wrong", OPTIONS)
def test_options_out_of_range_are_refused(wrong):
    options, message = OPTIONS[wrong]
    with pytest.raises(ValueError, match=message):
        OutputBalancer("body", **options)


def test_outputs_of_passes_without_a_step_have_no_part_and_are_not_kept():
    """As in validation with gradients, or in a batch that is left out."""
    network, other = make_network(), make_network()
    balancer, optimizer = attached(network)
    balancer_of_other, optimizer_of_other = attached(other)
    batches = list(make_loader(2))
    unused = network(batches[0][0])
    forgotten = weakref.ref(network(batches[1][0]).grad_fn)
    assert forgotten() is None
    balancer.backward(output_losses(network, batches[1]), optimizer, model=network)
    balancer_of_other.backward(output_losses(other, batches[1]), optimizer_of_other, model=other)
    assert torch.equal(network[0].weight.grad, other[0].weight.grad)
    del unused


def test_no_output_is_kept_after_the_step():
    network = make_network()
    balancer, optimizer = attached(network)
    gc.disable()  # reference counts alone must do
    try:
        losses = output_losses(network, next(iter(make_loader())))
        node = mark_of(losses["fit"])
        output, node = weakref.ref(node.marked[1]), weakref.ref(node)
        balancer.backward(losses, optimizer, model=network)
        optimizer.step()
        del losses
        assert node() is None
        assert output() is None
    finally:
        gc.enable()


def mark_of(loss):
    node = loss.grad_fn
    while not hasattr(node, "marked"):
        node = node.next_functions[0][0]
    return node


def test_outputs_without_a_graph_are_left_alone():
    network = make_network()
    attached(network)
    x = next(iter(make_loader()))[0]
    with torch.no_grad():
        assert network(x).grad_fn is None
    network.requires_grad_(False)
    assert network(x).grad_fn is None


def test_an_output_may_be_changed_in_place_or_cut_up():
    found = []
    for change in (torch.relu, torch.relu_):
        network = make_network()
        balancer, optimizer = attached(network)
        first, second = change(network(next(iter(make_loader()))[0])).chunk(2, 1)
        losses = {"first": (first - 1).square().mean(), "second": (second - 1).square().mean()}
        balancer.backward(losses, optimizer, model=network)
        found.append(network[0].weight.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_a_module_trains_on_as_the_module(again):
    module = balanced_by_hand(Case(partial(OutputBalancer, "network"), output_losses), make_loader())
    other = again(module)
    batch = next(iter(make_loader(seed=4)))
    for one in (module, other):
        one.balancer.attach(one)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        optimizer.zero_grad()
        one.balancer.backward(one.case.losses(one.network, batch), optimizer, model=one)
        optimizer.step()
    assert largest_difference(module, other) == 0
    assert torch.equal(*(one.balancer.state_dict()["state"]["norms"] for one in (module, other)))


def test_a_compiled_network_is_named_as_a_whole():
    module, compiled = Balanced(CASES["output"]), Balanced(CASES["output"])
    compiled.network = torch.compile(compiled.network, backend="eager")
    for one in (module, compiled):
        fit(one, make_loader(), max_epochs=1)
    assert largest_difference(module, compiled) < 1e-12


def static_rank(rank, case):
    fit_rank(Balanced(case), rank, rounds(2, 2, torch.float64), strategy={"static_graph": True})


@pytest.mark.parametrize("make", [lambda: OutputBalancer("network"), lambda: GradNorm("network.0")])
def test_a_static_graph_is_refused(make, tmp_path):
    for outcome in run_ranks(static_rank, tmp_path, Case(make, output_losses)):
        assert "static_graph=True) would average nothing in the first step" in outcome.error
