from itertools import pairwise

import jsonargparse
import pytest
import torch
from torch import nn
from torchjd.aggregation import (
    IMTLG,
    MGDA,
    AlignedMTL,
    ConFIG,
    CRMOGMWeighting,
    ExcessMTL,
    GradDrop,
    GradVac,
    GramianWeightedAggregator,
    Mean,
    PCGrad,
    Random,
    UPGrad,
    UPGradWeighting,
)
from torchjd.autojac import backward, jac_to_grad

from lightning_mtadam import NonFiniteError
from lightning_mtadam.balancers import Balancer, TorchJDBalancer
from lightning_mtadam.balancers.aggregator_memory import drawing_from
from tests.balancers.gradients import (
    TwoHeads,
    assert_close,
    assert_resumed_bitwise,
    gradients_of,
    last_gradients,
    shown,
)
from tests.lightning_models import make_loader, make_network, sgd, three_losses

BATCHES = list(make_loader(5))
AGGREGATORS = {
    "UPGrad": UPGrad,
    "PCGrad": PCGrad,
    "IMTL-G": IMTLG,
    "MGDA": MGDA,
    "Aligned-MTL": AlignedMTL,
    "ConFIG": ConFIG,
    "Random": Random,
    "GradVac": GradVac,
    "mean": Mean,
}
STATEFUL = {
    "GradVac": GradVac,
    "ExcessMTL": ExcessMTL,
    "CR-MOGM": lambda: GramianWeightedAggregator(CRMOGMWeighting(UPGradWeighting())),
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_it_is_what_torchjd_makes_of_the_same_losses(name):
    network, aggregator = make_network(), AGGREGATORS[name]()
    parameters = list(network.parameters())
    balancer, optimizer = TorchJDBalancer(AGGREGATORS[name](), normalize=False, seed=5), sgd(network)
    for step, batch in enumerate(BATCHES):
        optimizer.zero_grad()
        backward(list(three_losses(network, batch).values()), inputs=parameters)
        with drawing_from(f"5/{step}", torch.device("cpu")):
            jac_to_grad(parameters, aggregator)
        expected = [parameter.grad for parameter in parameters]
        assert_close(shown(balancer, three_losses(network, batch), network), expected)
        optimizer.step()


@pytest.mark.parametrize("name", ["IMTL-G", "Aligned-MTL", "UPGrad", "PCGrad"])
def test_on_rows_of_unit_norm_a_factor_on_a_loss_changes_nothing(name):
    balancers = (TorchJDBalancer(AGGREGATORS[name]()) for _ in range(2))
    plain, multiplied = (last_gradients(b, BATCHES, fit=fit) for b, fit in zip(balancers, (1, 1e4), strict=True))
    assert_close(plain, multiplied, 1e-7)


@pytest.mark.parametrize("name", ["IMTL-G", "UPGrad", "PCGrad", "GradVac"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_term_weights_are_what_multiplied_the_losses(name, normalize):
    network = make_network()
    balancer = TorchJDBalancer(AGGREGATORS[name](), normalize=normalize)
    found = shown(balancer, three_losses(network, BATCHES[0]), network)
    network.zero_grad()
    losses, weights = three_losses(network, BATCHES[0]), balancer.term_weights()
    sum(weights[term] * loss for term, loss in losses.items()).backward()
    assert_close(found, [parameter.grad for parameter in network.parameters()], 1e-12)


def test_there_are_no_term_weights_where_the_aggregator_has_none():
    network = make_network()
    balancer = TorchJDBalancer(ConFIG())
    shown(balancer, three_losses(network, BATCHES[0]), network)
    assert balancer.term_weights() == {}


@pytest.mark.parametrize("normalize", [True, False])
def test_an_absent_term_has_no_row_and_no_weight(normalize):
    network = make_network()
    balancer = TorchJDBalancer(MGDA(), normalize=normalize, terms=("fit", "size", "decay"))
    losses = three_losses(network, BATCHES[0])
    del losses["size"]
    alone = TorchJDBalancer(MGDA(), normalize=normalize)
    expected = shown(alone, dict(losses), network)
    losses = three_losses(network, BATCHES[0])
    del losses["size"]
    assert_close(shown(balancer, losses, network), expected, 0)
    assert balancer.term_weights() == {
        "fit": alone.term_weights()["fit"],
        "size": 0,
        "decay": alone.term_weights()["decay"],
    }


def test_a_head_private_to_one_term_gets_its_gradient_times_its_weight():
    model = TwoHeads()
    losses = model.losses(BATCHES[0][0])
    own = gradients_of(losses, model)["second"][-2:]
    balancer = TorchJDBalancer(UPGrad())
    found = shown(balancer, losses, model)[-2:]
    assert_close(found, [balancer.term_weights()["second"] * gradient for gradient in own], 1e-12)


def test_a_row_of_zeros_stays_zero():
    network = make_network()
    losses = three_losses(network, BATCHES[0])
    seen = []
    balancer = TorchJDBalancer(lambda matrix: seen.append(matrix) or matrix.sum(0))
    shown(balancer, {**losses, "size": 0 * losses["size"]}, network)
    assert torch.allclose(seen[0].norm(dim=1), torch.tensor([1.0, 0, 1], dtype=torch.float64))


@pytest.mark.parametrize("aggregator", [PCGrad, UPGrad, AlignedMTL])
def test_a_row_whose_norm_underflows_counts_as_zeros(aggregator):
    """PCGrad would divide by the square of its norm."""
    found = []
    for factor in (1e-30, 0.0):
        model = nn.ParameterList([nn.Parameter(torch.zeros(2))])
        losses = {"satisfied": factor * model[0][0], "other": model[0][1] - model[0][0]}
        found += shown(TorchJDBalancer(aggregator()), losses, model)
    assert torch.equal(*found)
    assert found[0].norm() > 0


def test_rows_of_half_precision_are_widened():
    network = make_network(torch.bfloat16)
    seen = []
    balancer = TorchJDBalancer(lambda matrix: seen.append(matrix) or matrix.sum(0))
    found = shown(balancer, three_losses(network, next(iter(make_loader(1, torch.bfloat16)))), network)
    assert seen[0].dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in found)


@pytest.mark.parametrize("make", [GradDrop, Random, PCGrad])
def test_what_is_drawn_depends_on_the_seed_and_the_step_alone(make):
    network = make_network()

    state = torch.get_rng_state()
    first = TorchJDBalancer(make(), seed=1)
    expected = shown(first, three_losses(network, BATCHES[0]), network)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = TorchJDBalancer(make(), seed=1)
    assert_close(shown(second, three_losses(network, BATCHES[0]), network), expected, 0)


def test_another_seed_and_another_step_draw_other_numbers():
    network = make_network()
    weights = []
    for seed in (0, 1):
        balancer = TorchJDBalancer(Random(), seed=seed)
        for _ in range(2):
            shown(balancer, three_losses(network, BATCHES[0]), network)
            weights.append(torch.stack(list(balancer.term_weights().values())))
    assert len({tuple(row.tolist()) for row in weights}) == 4


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_a_step_of_two_batches_starts_from_the_state_before_it(make):
    """The first batch of a step leaves no trace in the aggregator but through the sum of both."""
    network, half = make_network(), torch.tensor(0.5)
    joined, apart = TorchJDBalancer(make(), seed=2), TorchJDBalancer(make(), seed=2)
    for first, second in pairwise(BATCHES):
        both = [torch.cat(tensors) for tensors in zip(first, second, strict=True)]
        optimizer = sgd(network)
        optimizer.zero_grad()
        for batch in (first, second):
            apart.backward(three_losses(network, batch), optimizer, model=network, grad_output=half)
        expected = [parameter.grad for parameter in network.parameters()]
        assert_close(shown(joined, three_losses(network, both), network), expected)
    one, two = joined.state_dict()["state"], apart.state_dict()["state"]
    assert any(key.startswith("aggregator.") for key in one)
    assert all(torch.allclose(value, two[key], rtol=1e-9) for key, value in one.items())


class Counting(nn.Module):
    """As NashMTL does, it makes at its first call what it needs later, and keeps numbers of several kinds."""

    def __init__(self):
        super().__init__()
        self.calls, self.fraction, self.doubled = 0.0, 0, torch.zeros(2).numpy()

    def forward(self, matrix):
        if self.calls == 0:
            self.solver = object()
        assert self.solver is not None
        self.calls += 1
        self.fraction += 3
        self.doubled = self.doubled + 2
        return matrix.sum(0) * self.calls + self.fraction + self.doubled.sum()


@pytest.mark.parametrize("make", [*STATEFUL.values(), Counting], ids=[*STATEFUL, "counting"])
def test_the_state_of_an_aggregator_is_resumed_bitwise_in_another_process(make, tmp_path):
    assert_resumed_bitwise(TorchJDBalancer(make()), TorchJDBalancer(make()), BATCHES, 3, tmp_path)


class Failing:
    def __init__(self):
        self.calls = 0

    def __call__(self, matrix):
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("no solution")
        return matrix.sum(0) * self.calls


def test_an_aggregator_that_raises_leaves_the_state():
    network = make_network()
    balancer = TorchJDBalancer(Failing())
    for batch in BATCHES[:2]:
        shown(balancer, three_losses(network, batch), network)
    state = balancer.state_dict()["state"]
    with pytest.raises(ArithmeticError, match="no solution"):
        shown(balancer, three_losses(network, BATCHES[2]), network)
    assert all(torch.equal(value, state[key]) for key, value in balancer.state_dict()["state"].items())
    assert int(state["aggregator.calls"]) == 2
    assert all(parameter.grad is None for parameter in network.parameters())


WRONG = {
    "number": (lambda matrix: 1.0, TypeError, "must return a tensor, but returned a float"),
    "weighting": (
        UPGradWeighting() << (lambda j: j @ j.T),
        ValueError,
        r"of shape \(32,\) of a matrix of shape \(3, 32\)",
    ),
    "nan": (lambda matrix: matrix.sum(0) / 0, NonFiniteError, "made inf or nan of finite gradients"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_an_aggregator_returns_is_checked(wrong):
    aggregator, error, message = WRONG[wrong]
    network = make_network()
    with pytest.raises(error, match=message):
        shown(TorchJDBalancer(aggregator), three_losses(network, BATCHES[0]), network)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="a str cannot be called"):
        TorchJDBalancer("UPGrad")


def test_it_is_built_from_a_configuration():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--balancer", type=Balancer)
    aggregator = {"class_path": "torchjd.aggregation.GradVac", "init_args": {"beta": 0.25}}
    config = {
        "class_path": "lightning_mtadam.balancers.TorchJDBalancer",
        "init_args": {"aggregator": aggregator, "seed": 3},
    }
    built = parser.instantiate_classes(parser.parse_object({"balancer": config})).balancer
    assert isinstance(built, TorchJDBalancer)
    assert isinstance(built.aggregator, GradVac)
    assert (built.aggregator.beta, built.seed, built.normalize) == (0.25, 3, True)
