"""A training on the accelerator gives the numbers of the host's, with every option and in every mode."""

import copy
import itertools

import pytest
import torch

from tests.accelerator.training import DEVICE, ROADS, assert_same, make, run

OPTIONS = {
    "default": {},
    "second term": {"anchor": "b"},
    "mean": {"anchor": "mean"},
    "max": {"anchor": "max"},
    "unit": {"anchor": "unit"},
    "no anchor": {"anchor": None},
    "importance": {"importance": {"b": 0.3}},
    "modules": {"layers": "module"},
    "groups": {"layers": "group"},
    "global": {"layers": "global"},
    "callable": {"layers": lambda name: name[:6]},
    "unbiased": {"norm_init": "unbiased"},
    "one": {"norm_init": "one"},
    "mean denominator": {"denominator": "mean"},
    "own denominator": {"denominator": "own"},
    "sum denominator": {"denominator": "sum"},
    "mean update": {"update": "mean"},
    "max_scale": {"max_scale": 2.0},
    "amsgrad": {"amsgrad": True},
    "own amsgrad": {"amsgrad": True, "denominator": "own"},
    "maximize": {"maximize": True},
    "weight_decay": {"weight_decay": 0.1},
    "no eps": {"eps": 0.0},
    "skip": {"on_nonfinite": "skip"},
    "every 4": {"balance_every": 4},
    "every 50": {"balance_every": 50},
}
LOW = {
    "default": {},
    "second term": {"anchor": "b"},
    "unit": {"anchor": "unit"},
    "no anchor": {"anchor": None},
    "modules": {"layers": "module"},
    "sum denominator": {"denominator": "sum"},
    "mean denominator": {"denominator": "mean"},
    "amsgrad": {"amsgrad": True},
    "weight_decay": {"weight_decay": 0.1},
}
STEPS = range(12)


def compare(options, road="plain", dtype=torch.float64, tolerance=1e-12):
    (here, expected), (there, optimizer) = (make(device, dtype, **options) for device in ("cpu", DEVICE))
    run(expected, here, STEPS, ROADS[road])
    run(optimizer, there, STEPS, ROADS[road])
    optimizer.synchronize()
    assert_same(optimizer, expected, tolerance=tolerance)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_in_every_mode(options, road):
    compare(OPTIONS[options], road)


@pytest.mark.parametrize("options", LOW)
def test_low_memory_with_every_option(options):
    compare({"low_memory": True, **LOW[options]})


@pytest.mark.parametrize("options", ["default", "own denominator", "sum denominator", "every 4", "amsgrad"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_narrower_dtypes(options, dtype, tolerance):
    compare(OPTIONS[options], dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_low_memory_in_narrower_dtypes(dtype, tolerance):
    compare({"low_memory": True}, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize(("written", "read"), list(itertools.product(["cpu", DEVICE], repeat=2)), ids="-".join)
@pytest.mark.parametrize("options", [{}, {"denominator": "own"}, {"balance_every": 4}, {"low_memory": True}], ids=str)
def test_a_checkpoint_of_one_device_continues_on_the_other(written, read, options):
    parameters, expected = make("cpu", **options)
    run(expected, parameters, STEPS)
    parameters, first = make(written, **options)
    run(first, parameters, STEPS[:8])
    saved = copy.deepcopy(first.state_dict())
    continued, optimizer = make(read, **options)
    with torch.no_grad():
        for mine, theirs in zip(continued, parameters, strict=True):
            mine.copy_(theirs)
    optimizer.load_state_dict(saved)
    run(optimizer, continued, STEPS[8:])
    assert_same(optimizer, expected)


def test_moments_are_cut_for_arithmetic_that_is_wider_than_they_are(monkeypatch):
    def trained():
        parameters, optimizer = make(DEVICE, torch.bfloat16)
        run(optimizer, parameters, STEPS)
        return optimizer

    whole = trained()
    monkeypatch.setattr("lightning_mtadam.optim.update.SCRATCH", 1 << 12)
    assert_same(trained(), whole, tolerance=0)


def test_a_large_parameter_is_cut_with_low_memory(monkeypatch):
    monkeypatch.setattr("lightning_mtadam.optim.update.SCRATCH", 1 << 14)  # 512 elements
    compare({"low_memory": True})
