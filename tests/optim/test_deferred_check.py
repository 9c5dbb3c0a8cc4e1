"""On an accelerator a step with an inf or nan changes nothing, and the next call tells of it.

The host is told that the CPU's tensors are an accelerator's.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_mtadam import NonFiniteError, finite, terms
from lightning_mtadam.optim import MTAdam
from tests import loops
from tests.lightning_models import assert_same, assert_same_state, make_loader, make_network, three_losses
from tests.loops import take_step, train
from tests.spoiling import spoilt

BATCHES = list(make_loader(12))


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch):
    for module in (finite, terms):
        monkeypatch.setattr(module, "is_host", lambda device: False)


def make(dtype=torch.float64, **options):
    network = make_network(dtype)
    groups = [
        {"params": list(network[0].named_parameters(prefix="0"))},
        {"params": list(network[2].named_parameters(prefix="2")), "lr": 3e-3},
    ]
    return network, MTAdam(groups, **{"lr": 1e-2, **options})


def step(network, optimizer, batch, factor=1.0, term="size", clip=None):
    losses = three_losses(network, [part.to(network[0].weight.dtype) for part in batch])
    take_step(optimizer, spoilt(losses, term, factor), clip=clip)


def numbers(network, optimizer):
    tensors = list(network.parameters())
    for state in optimizer.state.values():
        tensors += state.values()
    return [tensor.detach().clone() for tensor in tensors]


def assert_no_number_changed(before, after):
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other), (one - other).abs().max()


OPTIONS = {
    "max": {},
    "mean": {"denominator": "mean"},
    "own": {"denominator": "own"},
    "sum": {"denominator": "sum"},
    "amsgrad": {"amsgrad": True},
    "own, amsgrad": {"denominator": "own", "amsgrad": True},
    "weight decay": {"weight_decay": 0.3},
    "eps=0": {"eps": 0.0},
    "unbiased, mean": {"norm_init": "unbiased", "anchor": "mean", "update": "mean"},
    "seldom": {"balance_every": 3},
    "compile": {"compile": True, "amsgrad": True, "weight_decay": 0.3},
}


@pytest.mark.parametrize("clip", [None, (0.01, "norm"), (0.01, "value")], ids=["", "clip norm", "clip value"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_that_is_not_finite_changes_no_number(name, clip):
    if OPTIONS[name].get("compile") and clip is not None and clip[1] == "value":
        pytest.skip("a kernel of its own, which takes seconds")
    for after, factor in ((0, torch.inf), (4, torch.inf), (5, torch.nan)):
        network, optimizer = make(**OPTIONS[name])
        for batch in BATCHES[:after]:
            step(network, optimizer, batch, clip=clip)
        optimizer.backward(three_losses(network, BATCHES[0]))  # makes the state
        optimizer._allocate()
        before = numbers(network, optimizer)
        step(network, optimizer, BATCHES[after], factor, clip=clip)
        assert_no_number_changed(before, numbers(network, optimizer))


@pytest.mark.parametrize("name", OPTIONS)
def test_where_all_is_finite_it_changes_nothing(name, monkeypatch):
    expected, expected_optimizer = run(OPTIONS[name])
    for module in (finite, terms):
        monkeypatch.setattr(module, "is_host", lambda device: True)
    network, optimizer = run({**OPTIONS[name], "compile": False})
    tolerance = 1e-12 if OPTIONS[name].get("compile") else 0
    for one, other in zip(numbers(network, optimizer), numbers(expected, expected_optimizer), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("denominator", ["max", "own", "sum"])
def test_rounding_to_a_narrow_dtype_changes_no_number_either(dtype, denominator):
    network, optimizer = make(dtype, denominator=denominator, amsgrad=True, weight_decay=0.1)
    for batch in BATCHES[:5]:
        step(network, optimizer, batch)
    before = numbers(network, optimizer)
    step(network, optimizer, BATCHES[5], torch.inf)
    assert_no_number_changed(before, numbers(network, optimizer))


@pytest.mark.parametrize("term", ["fit", "size", "decay"])
def test_the_next_step_raises_and_names_term_and_layer(term):
    network, optimizer = make()
    step(network, optimizer, BATCHES[0])
    step(network, optimizer, BATCHES[1], torch.inf, term)
    before = numbers(network, optimizer)
    with pytest.raises(
        NonFiniteError, match=f"term '{term}' at the layer '0.weight' is not finite.*Nothing was changed"
    ):
        step(network, optimizer, BATCHES[2])
    assert_no_number_changed(before, numbers(network, optimizer))
    step(network, optimizer, BATCHES[2])  # once caught, training can go on
    assert not torch.equal(before[0], network[0].weight)


def test_where_few_steps_are_measured_the_next_backward_raises():
    network, optimizer = make(balance_every=3)
    step(network, optimizer, BATCHES[0], torch.inf)
    with pytest.raises(NonFiniteError, match="term 'size'"):
        optimizer.backward(three_losses(network, BATCHES[1]))
    assert optimizer.param_groups[0]["steps"] == 0


def run(options, spoil=(), leave_out=(), clip=None):
    network, optimizer = make(on_nonfinite="skip", **options)
    for index, batch in enumerate(BATCHES):
        if index not in leave_out:
            step(network, optimizer, batch, torch.inf if index in spoil else 1.0, clip=clip)
    return network, optimizer


@pytest.mark.parametrize("bad", [(0,), (2, 6), (4, 5)])
@pytest.mark.parametrize("clip", [None, (0.01, "norm")])
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "compile"])
def test_skipped_steps_are_as_if_they_had_not_been(name, clip, bad):
    with pytest.warns(UserWarning, match=r"A step was skipped.*the term 'size' at the layer '0\.") as caught:
        network, optimizer = run(OPTIONS[name], spoil=bad, clip=clip)
    assert len(caught) == 1
    assert caught[0].filename == loops.__file__, "where step() was called"
    expected, expected_optimizer = run(OPTIONS[name], leave_out=bad, clip=clip)
    assert_same(network, expected)
    assert_same_state(optimizer, expected_optimizer)  # the count of steps too
    for layer, scales in expected_optimizer.scales().items():
        assert torch.equal(optimizer.scales()[layer], scales)


def test_a_checkpoint_loaded_after_it_is_not_blamed():
    network, optimizer = make()
    step(network, optimizer, BATCHES[0])
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(network.state_dict())
    step(network, optimizer, BATCHES[1], torch.inf)
    optimizer.load_state_dict(saved[0])
    network.load_state_dict(saved[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(network, optimizer, BATCHES[1])
    assert optimizer.param_groups[0]["steps"] == 2


def test_a_term_that_was_first_measured_in_a_skipped_step_is_measured_again():
    network = nn.Linear(3, 2, dtype=torch.float64)
    optimizer = MTAdam(network.named_parameters(), terms=("a", "b"), lr=0.1, balance_every=50, on_nonfinite="skip")
    x = torch.ones(1, 3, dtype=torch.float64)

    def losses():
        for index in range(7):
            output = network(x)
            found = {"a": output.square().sum()} | ({"b": output.sum()} if index >= 5 else {})
            yield spoilt(found, "b", torch.inf) if index == 5 else found

    with pytest.warns(UserWarning, match="A step was skipped"):
        train(optimizer, losses())
    assert float(optimizer.gradient_norms()["global"][1]) > 0
