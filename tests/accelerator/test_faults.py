"""What goes wrong on accelerators and not on the host: several devices, late errors, autocast, layouts."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_mtadam import MTAdam, NonFiniteError
from tests.accelerator.test_equality import LOW, OPTIONS, STEPS
from tests.accelerator.training import (
    DEVICE,
    FIRST,
    ROADS,
    SECOND,
    TERMS,
    assert_same,
    groups_of,
    losses_of,
    make,
    network,
    run,
)

two_devices = pytest.mark.two_devices
PLACES = {
    "two accelerators": [FIRST] * 3 + [SECOND] * 4,
    "in turn": [SECOND, FIRST] * 3 + [SECOND],
    "and the host": [FIRST] * 3 + ["cpu"] * 4,
    "the host first": ["cpu"] * 3 + [SECOND] * 4,
}


def spoiled(step, parameters):
    """Losses of which one has a gradient of inf."""
    losses = losses_of(step, parameters)
    return {**losses, "b": losses["b"] + (parameters[4][0] * torch.inf).sum() * 1}


def spread_over(places, **options):
    parameters = nn.ParameterList(
        [nn.Parameter(one.detach().to(place)) for one, place in zip(network("cpu"), places, strict=True)]
    )
    return parameters, MTAdam(groups_of(parameters), lr=1e-2, terms=TERMS, **options)


def losses_over(step, parameters):
    """``losses_of``, of parameters on several devices."""
    here = [parameter.to("cpu") if parameter.device.type != "cpu" else parameter for parameter in parameters]
    return losses_of(step, here)


def follow(optimizer, parameters, road):
    for step in STEPS:
        optimizer.zero_grad()
        if road == "accumulated":
            for part in (0, 50):
                optimizer.backward(losses_over(step + part, parameters), grad_output=torch.tensor(0.5).double())
        elif road == "scaled":
            scale = torch.tensor(1024.0, device=DEVICE)
            factor = scale.double().cpu()  # as the losses
            optimizer.backward(losses_over(step, parameters), grad_output=factor, loss_scale=scale)
        else:
            optimizer.backward(losses_over(step, parameters))
        if road.startswith("clipped"):
            optimizer.clip_gradients(0.7 if "norm" in road else 0.01, road.split()[-1])
        optimizer.step()


# Several devices


@two_devices
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("options", OPTIONS)
def test_one_network_over_several_devices(options, places):
    here, expected = make("cpu", **OPTIONS[options])
    run(expected, here, STEPS)
    there, optimizer = spread_over(PLACES[places], **OPTIONS[options])
    follow(optimizer, there, "plain")
    optimizer.synchronize()
    assert_same(optimizer, expected)


@two_devices
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("road", [road for road in ROADS if road != "plain"])
def test_one_network_over_several_devices_in_other_modes(road, places):
    here, expected = make("cpu")
    run(expected, here, STEPS, ROADS[road])
    there, optimizer = spread_over(PLACES[places])
    follow(optimizer, there, road)
    assert_same(optimizer, expected)


@two_devices
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("options", LOW)
def test_one_network_over_several_devices_with_low_memory(options, places):
    here, expected = make("cpu", low_memory=True, **LOW[options])
    run(expected, here, STEPS)
    there, optimizer = spread_over(PLACES[places], low_memory=True, **LOW[options])
    follow(optimizer, there, "plain")
    assert_same(optimizer, expected)


# Gradients that are not finite


def numbers(optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    return [value for entries in state["state"].values() for value in entries.values()], state["param_groups"]


@two_devices
@pytest.mark.parametrize("device", [FIRST, SECOND])
@pytest.mark.parametrize("options", [{}, {"denominator": "own"}, {"balance_every": 4}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("at", [5, 7])  # with balance_every=4 the second is light
def test_a_step_that_is_not_finite_changes_nothing_and_is_told_later(device, options, at):
    parameters, optimizer = make(device, **options)
    run(optimizer, parameters, range(at))
    before, groups = numbers(optimizer)
    weights = [parameter.detach().cpu() for parameter in parameters]
    optimizer.zero_grad()
    optimizer.backward(spoiled(at, parameters))
    optimizer.step()
    with pytest.raises(NonFiniteError, match=r"layer2\.p4"):
        optimizer.synchronize()
    after, counted = numbers(optimizer)
    assert all(torch.equal(mine.cpu(), theirs.cpu()) for mine, theirs in zip(after, before, strict=True))
    assert [group["steps"] for group in counted] == [group["steps"] for group in groups]
    assert [group["measured"] for group in counted] == [group["measured"] for group in groups]
    for parameter, weight in zip(parameters, weights, strict=True):
        assert torch.equal(parameter.detach().cpu(), weight)


@two_devices
@pytest.mark.parametrize("options", [{}, {"balance_every": 4}], ids=str)
def test_the_next_step_goes_on_after_it(options):
    parameters, optimizer = make(SECOND, on_nonfinite="skip", **options)
    same, expected = make(SECOND, on_nonfinite="skip", **options)
    run(optimizer, parameters, range(4))
    run(expected, same, range(4))
    optimizer.zero_grad()
    optimizer.backward(spoiled(4, parameters))
    optimizer.step()
    with pytest.warns(UserWarning, match="step was skipped"):
        run(optimizer, parameters, range(4, 8))
    run(expected, same, range(4, 8))
    optimizer.synchronize()
    assert_same(optimizer, expected, tolerance=0)


def test_a_checkpoint_after_a_step_that_was_not_finite_tells_of_it():
    parameters, optimizer = make(DEVICE)
    run(optimizer, parameters, range(3))
    optimizer.zero_grad()
    optimizer.backward(spoiled(3, parameters))
    optimizer.step()
    with pytest.raises(NonFiniteError):
        optimizer.state_dict()
    optimizer.state_dict()  # it is told once


def test_with_low_memory_it_is_told_later_too():
    parameters, optimizer = make(DEVICE, low_memory=True)
    run(optimizer, parameters, range(3))
    weights = [parameter.detach().cpu() for parameter in parameters]
    optimizer.zero_grad()
    optimizer.backward(spoiled(3, parameters))
    optimizer.step()
    with pytest.raises(NonFiniteError):
        optimizer.synchronize()
    for parameter, weight in zip(parameters, weights, strict=True):
        assert torch.equal(parameter.detach().cpu(), weight)
    assert all(bool(value.cpu().isfinite().all()) for value in numbers(optimizer)[0])


# Autocast, default device, layouts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"balance_every": 4}, {"low_memory": True}], ids=str)
def test_backward_and_step_within_autocast(dtype, options):
    def trained(within):
        parameters, optimizer = make(DEVICE, dtype, **options)
        with torch.autocast(DEVICE, dtype, enabled=within):
            for step in range(4):
                optimizer.zero_grad()
                losses = {name: loss.float() for name, loss in losses_of(step, parameters).items()}
                optimizer.backward(losses)
                assert all(p.grad is None or p.grad.dtype == dtype for p in parameters)
                optimizer.step()
        return optimizer

    with torch.autocast(DEVICE, enabled=False):
        expected = trained(False)
    assert_same(trained(True), expected, tolerance=0.05)


def run_beside_the_default(optimizer, parameters):
    """Train while the default device is another; only the losses are drawn on the host."""
    for step in STEPS:
        with torch.device("cpu"):
            losses = losses_of(step, parameters)
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_default_device_changes_nothing(options):
    here, expected = make("cpu", **OPTIONS[options])
    run(expected, here, STEPS)
    torch.set_default_device(DEVICE)
    with torch.device("cpu"):
        parameters = network("cpu")
    optimizer = MTAdam(groups_of(parameters), lr=1e-2, terms=TERMS, **OPTIONS[options])
    run_beside_the_default(optimizer, parameters)
    optimizer.layer_sizes()
    assert_same(optimizer, expected, tolerance=0)


@two_devices
@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"layers": "module"}], ids=str)
def test_a_default_device_that_is_not_the_parameters(options):
    here, expected = make(FIRST, **options)
    run(expected, here, STEPS)
    torch.set_default_device(SECOND)
    with torch.device("cpu"):
        there, optimizer = make(FIRST, **options)
    run_beside_the_default(optimizer, there)
    assert_same(optimizer, expected, tolerance=0)


LAYOUTS = {
    "channels_last": lambda: torch.empty(8, 6, 4, 4).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.empty(40, 30).t(),
    "every second": lambda: torch.empty(60, 40)[::2],
    "columns": lambda: torch.empty(30, 80)[:, :40],
}


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"denominator": "own"}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, options):
    def trained(device, lay):
        with torch.no_grad():
            laid = LAYOUTS[layout]() if lay else LAYOUTS[layout]().contiguous()
            laid = laid.double().to(device) if laid.is_contiguous() else _like(laid, device)
            laid.copy_(torch.linspace(-1, 1, laid.numel(), dtype=torch.float64).view(laid.shape).to(device))
        parameter = laid.requires_grad_()
        optimizer = MTAdam([parameter, nn.Parameter(torch.ones(7, device=device).double())], **options)
        for step in range(4):
            optimizer.zero_grad()
            other = optimizer.param_groups[0]["params"][1]
            optimizer.backward({"a": (parameter - step).square().sum(), "b": 30 * parameter.sin().sum() + other.sum()})
            optimizer.step()
        return parameter, optimizer

    parameter, optimizer = trained(DEVICE, lay=True)
    _, expected = trained("cpu", lay=False)
    assert_same(optimizer, expected)
    with torch.no_grad():
        assert parameter.stride() == LAYOUTS[layout]().stride()


def _like(laid, device):
    """The same layout on another device, with the gaps."""
    whole = torch.zeros(laid.untyped_storage().nbytes() // laid.element_size(), dtype=torch.float64, device=device)
    return whole.as_strided(laid.shape, laid.stride(), laid.storage_offset())


def test_runs_repeat_to_the_last_digit():
    def trained():
        parameters, optimizer = make(DEVICE, layers="module")
        run(optimizer, parameters, STEPS)
        return optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.use_deterministic_algorithms(True)
        try:
            first = trained()
        finally:
            torch.use_deterministic_algorithms(False)
    assert_same(trained(), first, tolerance=0)


@pytest.mark.parametrize("options", [{}, {"low_memory": True}], ids=str)
def test_a_change_of_the_memory_format_between_steps(options):
    def trained(device):
        convolution = nn.Conv2d(3, 2, 2, bias=False).double()
        with torch.no_grad():
            convolution.weight.copy_(torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 2, 2))
        convolution.to(device)
        optimizer = MTAdam(convolution.named_parameters(), **options)
        for step in range(6):
            if step == 3:
                convolution.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            weight = convolution.weight
            optimizer.backward({"a": (weight - 1).square().sum(), "b": 30 * (weight * weight[0, 0, 0, 0]).sum()})
            gradient = weight.grad.cpu()
            optimizer.step()
        return optimizer, gradient

    (here, expected), (there, found) = trained("cpu"), trained(DEVICE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_same(there, here)


def test_a_kept_checkpoint_does_not_follow_the_training_and_holds_no_others():
    parameters, optimizer = make(DEVICE)
    run(optimizer, parameters, range(3))
    kept = optimizer.state_dict()["state"]
    before = copy.deepcopy(kept)
    run(optimizer, parameters, range(3, 5))
    for index, state in kept.items():
        for name, value in state.items():
            assert torch.equal(value.cpu(), before[index][name].cpu()), name
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
