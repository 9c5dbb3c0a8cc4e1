"""Torch's fused Adam, one call a term, gives what the arithmetic operation by operation gives."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mtadam import MTAdam
from lightning_mtadam.optim import fused, kernels
from lightning_mtadam.optim.kernels import Coefficients, Hyperparameters, Moments

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def column(values, dtype):
    return torch.tensor(values, dtype=dtype)[:, None]


def block(terms, squares, reached, dtype, size, generator):
    """Random parameters, gradients, moments and coefficients; nothing where a term never reached."""
    mask = column([float(flag) for flag in reached], dtype)
    parameter = torch.randn(size, dtype=dtype, generator=generator)
    gradients = torch.randn(terms, size, dtype=dtype, generator=generator) * mask
    kept = mask if squares == terms else torch.ones(1, 1, dtype=dtype)
    second = torch.rand(squares, size, dtype=dtype, generator=generator) * kept
    first = torch.randn(1, size, dtype=dtype, generator=generator) * float(any(reached))
    scales = torch.rand(terms, 1, dtype=dtype, generator=generator) + 0.1
    weights = 0.001 + 0.5 * torch.rand(squares, 1, dtype=dtype, generator=generator)
    factor = torch.full((1, 1), 0.7, dtype=dtype)
    return parameter, gradients, Moments(first, second, None), Coefficients(scales, weights * kept, factor, None, None)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    reached=st.lists(st.booleans(), min_size=1, max_size=12),
    denominator=st.sampled_from(["max", "sum"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    lr=st.sampled_from([0.0, 0.01, -0.01]),
    decay=st.sampled_from([1.0, 0.99]),
    size=st.integers(1, 67),
)
def test_a_call_a_term_equals_operation_by_operation(seed, reached, denominator, dtype, beta1, lr, decay, size):
    generator = torch.Generator().manual_seed(seed)
    squares = 1 if denominator == "sum" else len(reached)
    parameter, gradients, moments, local = block(len(reached), squares, reached, dtype, size, generator)
    hyper = Hyperparameters(lr=lr, beta1=beta1, eps=1e-8, decay=decay if lr else 1.0, denominator=denominator)
    plain = replace(moments, exp_avg=moments.exp_avg.clone(), exp_avg_sq=moments.exp_avg_sq.clone())
    expected = parameter.clone()
    scratch = torch.empty(len(reached) + 1, size, dtype=dtype)
    kernels.update(expected, gradients.clone(), plain, local, hyper, scratch)
    assert fused.applies(gradients, moments, hyper, packed=False)
    fused.update(parameter, gradients, moments, local, hyper, scratch)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(parameter, expected, **close)
    torch.testing.assert_close(moments.exp_avg, plain.exp_avg, **close)
    torch.testing.assert_close(moments.exp_avg_sq, plain.exp_avg_sq, **close)


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 0.0},
        {"clip_value": 1.0},
        {"finite": torch.tensor(True)},
        {"denominator": "own"},
        {"denominator": "mean"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_adams_kernel_cannot_do_is_left_to_the_plain_one(change):
    _, gradients, moments, _ = block(2, 2, [True, True], torch.float32, 3, torch.Generator())
    hyper = Hyperparameters(lr=0.01, beta1=0.9, eps=1e-8, decay=1.0, denominator="max")
    assert fused.applies(gradients, moments, hyper, packed=False)
    assert not fused.applies(gradients, moments, replace(hyper, **change), packed=False)
    assert not fused.applies(gradients, moments, hyper, packed=True)
    assert not fused.applies(gradients.bfloat16(), moments, hyper, packed=False)
    assert not fused.applies(gradients.to("meta"), moments, hyper, packed=False)
    assert not fused.applies(gradients, replace(moments, max_exp_avg_sq=moments.exp_avg_sq), hyper, packed=False)


def test_blocks_give_what_the_whole_gives(monkeypatch):
    def train():
        generator = torch.Generator().manual_seed(0)
        parameter = torch.randn(5003, generator=generator, dtype=torch.float64).requires_grad_()
        optimizer = MTAdam([parameter], lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            directions = torch.randn(3, 5003, generator=generator, dtype=torch.float64)
            optimizer.backward({f"term{i}": (direction * parameter).sum() for i, direction in enumerate(directions)})
            optimizer.step()
        return parameter.detach()

    whole = train()
    monkeypatch.setattr(fused, "BLOCK", 1000)
    torch.testing.assert_close(train(), whole, rtol=1e-13, atol=1e-13)
