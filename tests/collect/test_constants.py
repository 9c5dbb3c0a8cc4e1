"""A constant travels once to each device, and not all are kept for ever."""

import torch

from lightning_mtadam.collect import constants
from lightning_mtadam.collect.constants import constant

HOST = torch.device("cpu")


def test_the_same_values_are_the_same_tensor():
    one = constant([1, 0, 1], torch.bool, HOST)
    assert constant((True, False, True), torch.bool, HOST) is one
    assert one.tolist() == [True, False, True]


def test_another_dtype_is_another_tensor():
    assert constant([1, 2], torch.float32, HOST).dtype == torch.float32
    assert constant([1, 2], torch.int64, HOST).dtype == torch.int64


def test_a_number_is_a_scalar():
    assert constant(0.5, torch.float64, HOST).shape == ()


def test_values_that_change_from_step_to_step_are_not_all_kept():
    for number in range(2000):
        assert constant([number], torch.int64, HOST).tolist() == [number]
    assert constants._made.cache_info().currsize <= 512


def test_what_an_evaluation_asks_for_first_can_be_used_in_training():
    with torch.inference_mode():
        made = constant([0.125, 8.0], torch.float32, HOST)
    weight = torch.ones(2, requires_grad=True)
    (made * weight).sum().backward()
    assert weight.grad.tolist() == [0.125, 8.0]
