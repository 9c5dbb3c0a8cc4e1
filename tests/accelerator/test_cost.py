"""What a step costs on an accelerator: kernels, waits of the host, and memory; they are counted, not timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from lightning_mtadam import MTAdam
from lightning_mtadam.optim import term_optimizer
from tests.accelerator.device import KINDS, Watch, native
from tests.accelerator.linear import losses_of, step
from tests.accelerator.measures import OPTIONS, settled
from tests.accelerator.networks import gpt2_shapes, resnet18

pytestmark = pytest.mark.stand_in

RESNET = [tuple(parameter.shape) for parameter in resnet18().parameters()]
SCRATCH = 64 * 2**20  # bytes beside the multiples of the parameters


def kernels_of(parameters: nn.ParameterList, optimizer: MTAdam, terms: int) -> Watch:
    """What one step calls, without the gradients themselves."""
    losses = losses_of(parameters, terms)
    with Watch(*KINDS[:4]) as watch:
        step(optimizer, losses)
    return watch


def own_kernels(shapes: Sequence[tuple[int, ...]], terms: int, backwards: int, **options: object) -> int:
    watch = kernels_of(*settled(shapes, "accel", terms, **options), terms)
    return watch.launches - 2 * backwards * len(shapes)  # each gradient takes two


@pytest.mark.parametrize(("terms", "limit"), [(2, 150), (3, 180), (10, 400)])
def test_kernels_of_a_step_on_resnet18(terms, limit):
    assert own_kernels(RESNET, terms, terms) <= limit


@pytest.mark.parametrize("terms", [2, 3, 10])
def test_kernels_of_a_light_step_on_resnet18(terms):
    added = (terms - 1) * len(RESNET)  # autograd adds up what the terms of a sum give to the same parameters
    assert own_kernels(RESNET, terms, terms, balance_every=1000) - added <= 110


def test_kernels_of_a_step_with_low_memory_on_resnet18():
    assert own_kernels(RESNET, 3, 3, low_memory=True) <= 600


@pytest.mark.parametrize("share", [16, 4])  # all of it takes 5 GB: python -m tests.accelerator.on_gpu --device accel
def test_kernels_of_a_step_on_gpt2_do_not_depend_on_its_size(share):
    assert own_kernels(gpt2_shapes(share), 3, 3) <= 500


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_host_waits_for_one_event_a_step(options):
    parameters, optimizer = settled([(30, 20), (20,), (7, 3, 2)], "accel", 3, **options)
    for _ in range(4):  # with balance_every=2 both kinds of steps, and what is between them
        watch = kernels_of(parameters, optimizer, 3)
        assert sum(watch.waits.values()) <= 1


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_host_does_not_wait_for_clipping(algorithm):
    parameters, optimizer = settled([(30, 20), (20,)], "accel", 2)
    for forbidden in ((), KINDS[:4], KINDS[:4]):
        optimizer.zero_grad()
        optimizer.backward(losses_of(parameters, 2))
        optimizer.clip_gradients(0.1, algorithm)
        with Watch(*forbidden):
            optimizer.step()


def most_held(train: Callable[[], object], before: int) -> int:
    """Bytes beyond what was held ``before``."""
    with Watch() as watch:
        train()
    return native().memory()[1] - before if watch.peak else 0


@pytest.mark.parametrize(("options", "multiple"), [({}, 2 * 3 + 3), ({"denominator": "sum"}, 3 + 5)], ids=str)
def test_memory_in_multiples_of_the_parameters(options, multiple, monkeypatch):
    """From the first step on: state, gradients, ``p.grad``, and one for a term's own gradients or for results.

    But for the look at functions of one's own, as these losses are, which takes their gradients once more.
    """
    monkeypatch.setattr(term_optimizer, "tell_of_added_gradients", lambda *_: None)
    before, shapes = native().memory()[0], gpt2_shapes(4)
    size = 4 * sum(map(math.prod, shapes))
    assert most_held(lambda: settled(shapes, "accel", 3, **options), before) <= (1 + multiple) * size + SCRATCH


def test_memory_with_low_memory_once_it_is_known_what_the_anchor_reaches():
    before, shapes = native().memory()[0], gpt2_shapes(4)
    size = 4 * sum(map(math.prod, shapes))
    parameters, optimizer = settled(shapes, "accel", 3, low_memory=True)
    held = most_held(lambda: step(optimizer, losses_of(parameters, 3)), before)
    assert held <= (1 + 3 + 3) * size + SCRATCH


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_step_that_is_clipped(algorithm, dtype):
    """One time the parameters, and the memory for results; not one for each term."""
    parameters = nn.ParameterList(
        [nn.Parameter(torch.full(shape, 0.1, device="accel", dtype=dtype)) for shape in gpt2_shapes(4)]
    )
    size = dtype.itemsize * sum(parameter.numel() for parameter in parameters)
    optimizer = MTAdam(parameters.named_parameters())
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(losses_of(parameters, 5))
        optimizer.clip_gradients(0.1, algorithm)
        with Watch() as watch:
            optimizer.step()
    assert watch.peak <= 1.1 * size + SCRATCH
