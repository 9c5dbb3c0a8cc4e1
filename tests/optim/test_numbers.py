"""Learning rate, betas and the like may be numbers of numpy's or tensors; a checkpoint holds Python's."""

import io

import numpy as np
import pytest
import torch

from lightning_mtadam import MTAdam
from lightning_mtadam.balancers import FixedWeights, GradNorm, MetaBalance, OutputBalancer, SharedLayerBalancer
from lightning_mtadam.terms import plain
from tests.lightning_models import assert_same, make_loader, make_network, three_losses
from tests.loops import hand_loop

KINDS = {
    "np.float64": np.float64,
    "np.float32": np.float32,
    "an array": np.array,
    "a tensor": torch.tensor,
    "a double": lambda number: torch.tensor(number, dtype=torch.float64),
    "one element": lambda number: torch.tensor([number], dtype=torch.float64),
}
NUMBERS = {"lr": 2**-6, "betas": (0.875, 0.9921875, 0.75), "eps": 2**-20, "weight_decay": 0.0625}  # exact in fp32
MODES = [{}, {"amsgrad": True}, {"balance_every": 2}, {"low_memory": True}]

of_every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
in_every_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def converted(kind):
    return {key: tuple(map(kind, one)) if isinstance(one, tuple) else kind(one) for key, one in NUMBERS.items()}


def trained(mode, numbers, later=None):
    network = make_network()
    optimizer = MTAdam(network.named_parameters(), **numbers, **mode)
    if later is not None:
        optimizer.param_groups[0].update(later)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    hand_loop(network, optimizer, make_loader(), scheduler=scheduler)
    return network, optimizer


@in_every_mode
@of_every_kind
def test_they_train_as_pythons_do(kind, mode):
    assert_same(trained(mode, converted(kind))[0], trained(mode, NUMBERS)[0])


@in_every_mode
@of_every_kind
def test_they_may_be_given_to_the_group_later(kind, mode):
    assert_same(trained(mode, {}, later=converted(kind))[0], trained(mode, NUMBERS)[0])


@of_every_kind
def test_a_checkpoint_with_them_loads_weights_only_and_holds_pythons(kind):
    network, optimizer = trained({}, converted(kind))
    optimizer.param_groups[0].update(max_lr=kind(0.5), swa=[kind(1.0)])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    group = saved["param_groups"][0]
    assert [type(group[name]) for name in ("lr", "eps", "weight_decay", "max_lr")] == [float] * 4
    assert group["betas"] == NUMBERS["betas"]
    assert group["swa"] == [1.0]
    resumed, other = make_network(), trained({}, converted(kind))[0]
    resumed.load_state_dict(network.state_dict())
    again = MTAdam(resumed.named_parameters())
    again.load_state_dict(saved)
    hand_loop(resumed, again, make_loader(), epochs=1)
    hand_loop(network, optimizer, make_loader(), epochs=1)
    assert_same(resumed, network)
    assert any(not torch.equal(a, b) for a, b in zip(other.parameters(), network.parameters(), strict=True))


def test_a_tensor_that_is_changed_in_place_counts():
    lr, network, other = torch.tensor(0.5), make_network(), make_network()
    optimizer = MTAdam(network.named_parameters(), lr=lr)
    lr.fill_(2**-6)
    hand_loop(network, optimizer, make_loader())
    hand_loop(other, MTAdam(other.named_parameters(), lr=2**-6), make_loader())
    assert_same(network, other)


@of_every_kind
def test_options_of_the_whole_optimizer_may_be_such_numbers(kind):
    def made(convert):
        return {"max_scale": convert(64.0), "importance": {"size": convert(0.5)}}

    assert_same(trained(made(kind), NUMBERS)[0], trained(made(float), NUMBERS)[0])


@pytest.mark.parametrize("every", [np.int64(2), torch.tensor(2)])
def test_a_whole_number_too(every):
    assert_same(trained({"balance_every": every}, NUMBERS)[0], trained({"balance_every": 2}, NUMBERS)[0])


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [torch.ones(2), np.ones(3), torch.tensor(1j), "0.1"], ids=repr)
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        MTAdam(make_network().named_parameters(), **{name: value})


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_what_is_out_of_range_is_refused_by_name(kind):
    parameters = list(make_network().named_parameters())
    with pytest.raises(ValueError, match=r"lr must be a finite number of at least 0, but got -1\.0"):
        MTAdam(parameters, lr=kind(-1.0))
    with pytest.raises(ValueError, match=r"beta3 must be in \[0, 1\), but got 1\.0"):
        MTAdam(parameters, betas=(0.5, 0.5, kind(1.0)))


def balancers(kind):
    weights = {"fit": kind(1.0), "size": kind(0.5), "decay": kind(4.0)}
    return [
        FixedWeights(weights),
        GradNorm("0", alpha=kind(0.5), lr=kind(0.125)),
        GradNorm("0", initial_losses=weights),
        MetaBalance(relax=kind(0.5), beta=kind(0.75)),
        SharedLayerBalancer("0", importance=weights, decay=kind(0.5), limit=kind(8.0)),
    ]


@of_every_kind
@pytest.mark.parametrize("index", range(5))
def test_those_of_balancers_too(kind, index):
    networks = []
    for balancer in (balancers(kind)[index], balancers(float)[index]):
        network = make_network()
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
        for batch in make_loader():
            optimizer.zero_grad()
            balancer.backward(three_losses(network, batch), optimizer, model=network)
            optimizer.step()
        assert torch.save(balancer.state_dict(), io.BytesIO()) is None
        networks.append(network)
    assert_same(*networks)


@of_every_kind
def test_those_of_an_output_balancer_too(kind):
    balancer = OutputBalancer("", {"fit": kind(2.0)}, ema_decay=kind(0.5))
    assert (balancer.weights, balancer.ema_decay) == ({"fit": 2.0}, 0.5)


def test_all_else_stays_as_it_is():
    value = {"a": [1, "b", None], "c": torch.ones(3)}
    found = plain(value)
    assert found["a"] == [1, "b", None]
    assert found["c"] is value["c"]
