"""A constant travels once to each device, and what is kept is bounded by bytes."""

import gc

import pytest
import torch
from torch import nn

from lightning_mtadam import MTAdam, constants
from lightning_mtadam.constants import LIMIT, constant

HOST = torch.device("cpu")


def kept_bytes():
    """Of the numbers that are kept, and of the keys they are found by."""
    return sum(made.nbytes + len(numbers) for (numbers, *_), (made, _) in constants._kept.items())


def test_the_same_values_are_the_same_tensor():
    one = constant([1, 0, 1], torch.bool, HOST)
    assert constant((True, False, True), torch.bool, HOST) is one
    assert one.tolist() == [True, False, True]


def test_another_dtype_is_another_tensor():
    assert constant([1, 2], torch.float32, HOST).dtype == torch.float32
    assert constant([1, 2], torch.int64, HOST).dtype == torch.int64


def test_a_number_is_a_scalar_and_a_list_of_it_is_not():
    assert constant(0.5, torch.float64, HOST).shape == ()
    assert constant([0.5], torch.float64, HOST).shape == (1,)


@pytest.mark.parametrize(("count", "length"), [(10_000, 1), (300, 5_000), (20, 100_000), (3, 1_000_000)])
def test_whatever_is_asked_for_no_more_bytes_than_the_limit_are_kept(count, length):
    for number in range(count):
        made = constant([number] * length, torch.int64, HOST)
        assert made[0] == made[-1] == number
        assert len(made) == length
        if number % 50 == 0 or number + 1 == count:
            assert kept_bytes() <= LIMIT
    assert kept_bytes() + 512 * len(constants._kept) <= LIMIT


def test_what_was_asked_for_the_longest_ago_goes_first():
    asked, other = (constant([number] * 1000, torch.int64, HOST) for number in (-1, -2))
    for number in range(2 * LIMIT // 16_000):
        constant([number] * 1000, torch.int64, HOST)
        assert constant([-1] * 1000, torch.int64, HOST) is asked
    assert constant([-2] * 1000, torch.int64, HOST) is not other


def test_optimizers_of_many_parameters_leave_no_more_behind_than_the_limit():
    """Which have flags that differ from step to step."""
    before = kept_bytes()
    for seed in range(4):
        parts = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(2000)])
        optimizer, generator = MTAdam(parts.named_parameters()), torch.Generator().manual_seed(seed)
        for _ in range(4):
            chosen = torch.randperm(2000, generator=generator)[:1000].tolist()
            joined = torch.cat([parts[index] for index in chosen])
            optimizer.backward({"size": joined.square().sum(), "sum": joined.sum()})
            optimizer.step()
    del parts, optimizer, joined
    gc.collect()
    assert before <= LIMIT
    assert kept_bytes() <= LIMIT


def test_what_an_evaluation_asks_for_first_can_be_used_in_training():
    with torch.inference_mode():
        made = constant([0.125, 8.0], torch.float32, HOST)
    weight = torch.ones(2, requires_grad=True)
    (made * weight).sum().backward()
    assert weight.grad.tolist() == [0.125, 8.0]
