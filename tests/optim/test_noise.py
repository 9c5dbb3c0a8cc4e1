"""Gradients that are zero but for rounding are left out of anchor and balance; real ones that are as small are not.

The right value is that of the same function without the way through which nothing but noise comes.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from lightning_mtadam import balancing
from lightning_mtadam.export import export_weights
from lightning_mtadam.optim import MTAdam
from tests.loops import take_step, train
from tests.optim.streams import NAMES, TERMS, follow, layer_names, make, start, stream
from tests.oracles.naive_mtadam import NaiveMTAdam

STEPS = 400
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
every_way = pytest.mark.usefixtures("_every_way")


class BeforeNorm(nn.Module):
    """The issue's function: batch normalisation takes the bias of ``lin`` away, but for rounding."""

    def __init__(self, *, bias=True, reduce="mean"):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.bn, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)
        self.bias, self.reduce = bias, reduce

    def losses(self, x):
        h = self.lin(x)
        into = h if self.bias else F.linear(x, self.lin.weight)
        distance = (h.mean(0) - 2).square()
        entropy = F.cross_entropy(self.head(self.bn(into).relu()), (x[:, 0] > 0).long())
        return {"entropy": entropy, "distance": getattr(distance, self.reduce)()}


class KeyBias(nn.Module):
    """Softmax takes the bias of the keys away, but for rounding."""

    def __init__(self, *, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.bias = bias

    def losses(self, x):
        x = x.view(8, -1, 8)
        keys = self.k(x)
        into = keys if self.bias else F.linear(x, self.k.weight)
        out = F.scaled_dot_product_attention(self.q(x), into, self.v(x))
        return {"fit": (out - x.flip(1)).square().mean(), "keys": (keys.mean((0, 1)) - 2).square().mean()}


class Direction(nn.Module):
    """The norm of a weight does not depend on its direction, but for rounding."""

    def __init__(self, *, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.lin = weight_norm(nn.Linear(8, 4))
        self.whole = bias

    def losses(self, x):
        weight = self.lin.weight if self.whole else self.lin.parametrizations.weight.original0
        return {"size": weight.square().sum(), "fit": (self.lin(x) - x[:, :4]).square().mean()}


KINDS = {"batch norm": BeforeNorm, "key": KeyBias, "direction": Direction}


def inputs(steps, dtype):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(64, 8, generator=generator, dtype=torch.float64).to(dtype)


def trained(model, dtype, *, steps=STEPS, **options):
    """The model and the optimizer after steps on fresh batches."""
    model = model.to(dtype)
    optimizer = MTAdam(model.named_parameters(), lr=1e-2, **options)
    train(optimizer, (model.losses(x) for x in inputs(steps, dtype)))
    return model, optimizer


def values(model, dtype):
    *_, x = inputs(1, dtype)
    return {name: loss.item() for name, loss in model.losses(x).items()}


def assert_as_without(kind, dtype, *, steps=STEPS, **options):
    """Trained as the same function without the way of the noise, also in the second moments and clocks."""
    found, optimizer = trained(kind(bias=True), dtype, steps=steps, **options)
    right, other = trained(kind(bias=False), dtype, steps=steps, **options)
    for (name, ours), theirs in zip(found.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=CLOSE[dtype], atol=CLOSE[dtype], msg=lambda m, n=name: f"{n}: {m}"
        )
    for scales, expected in zip(optimizer.scales().values(), other.scales().values(), strict=True):
        torch.testing.assert_close(scales, expected, rtol=10 * CLOSE[dtype], atol=0)


@dtypes
@pytest.mark.parametrize("anchor", ["first", "mean"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_bias_before_batch_normalisation_is_trained_by_the_other_term(reduce, anchor, dtype):
    """0.003 with the first term as anchor; it was 3.8, and 1.9 with the geometric mean."""
    features = 16 if reduce == "sum" else 1
    model, _ = trained(BeforeNorm(reduce=reduce), dtype, anchor=anchor)
    right, _ = trained(BeforeNorm(reduce=reduce, bias=False), dtype, anchor=anchor)
    found, expected = values(model, dtype)["distance"], values(right, dtype)["distance"]
    assert found == pytest.approx(expected, rel=0.02)
    assert found / features < 0.02


@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchor", ["first", "second", "mean", "max", "unit"])
def test_it_is_as_if_noise_were_zero_for_every_anchor(anchor, kind, dtype):
    kind = KINDS[kind]
    if anchor == "second":
        anchor = list(kind().losses(next(inputs(1, torch.float32))))[1]
    assert_as_without(kind, dtype, steps=60, anchor=anchor)


@every_way
@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {"denominator": "mean"},
        {"denominator": "own"},
        {"denominator": "sum"},
        {"update": "mean"},
        {"norm_init": "unbiased"},
        {"norm_init": "one"},
        {"amsgrad": True},
        {"low_memory": True},
        {"low_memory": True, "anchor": "unit"},
        {"low_memory": True, "anchor": "distance"},
        {"layers": "module"},
        {"layers": "group"},
        {"layers": "global"},
        {"balance_every": 4},
        {"betas": (0.9, 0.999, 0.0)},
        {"max_scale": 0.5},
    ],
    ids=str,
)
def test_it_is_as_if_noise_were_zero_for_every_option(options, dtype):
    assert_as_without(BeforeNorm, dtype, steps=40, **options)


def test_what_is_left_out_has_no_weight_and_scale_zero_but_its_norm():
    _, optimizer = trained(BeforeNorm(), torch.float64, steps=5)
    assert 0 < optimizer.gradient_norms()["lin.bias"][0] < 1e-15
    assert optimizer.balance_weights()["lin.bias"].isnan().tolist() == [True, False]
    assert optimizer.balance_weights()["lin.bias"][1] == 1
    assert optimizer.scales()["lin.bias"].tolist() == [0, 1]
    assert optimizer.average_weights()["entropy"][1].isnan()
    assert all(0 < weight < float("inf") for weight in export_weights(optimizer).values())


def test_without_balance_nothing_is_left_out():
    _, optimizer = trained(BeforeNorm(), torch.float64, steps=5, anchor=None)
    assert optimizer.scales()["lin.bias"].tolist() == [1, 1]


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_factor_on_a_loss_changes_nothing(factor):
    """Neither what is noise, nor the trajectory; at ``eps=0``, as layers private to the entropy are as by Adam."""

    def run(factor):
        model = BeforeNorm().double()
        optimizer = MTAdam(model.named_parameters(), lr=1e-2, eps=0.0, anchor="distance")
        for x in inputs(60, torch.float64):
            entropy, distance = model.losses(x).values()
            take_step(optimizer, {"entropy": factor * entropy, "distance": distance})
        return model

    for ours, theirs in zip(run(factor).parameters(), run(1.0).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_resumed_from_a_checkpoint_it_goes_on_bit_for_bit():
    model, optimizer = trained(BeforeNorm(), torch.float64, steps=10)
    twin = BeforeNorm().double()
    twin.load_state_dict(model.state_dict())
    other = MTAdam(twin.named_parameters(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    for x in inputs(10, torch.float64):
        take_step(optimizer, model.losses(x))
        take_step(other, twin.losses(x))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


# Real gradients that are as small


def deep(depth=12, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(8, 16), nn.Sigmoid()]
    for _ in range(depth - 1):
        layers += [nn.Linear(16, 16), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(16, 2))


@dtypes
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"anchor": "mean"}, {"anchor": "unit"}, {"low_memory": True}], ids=str)
def test_deep_networks_are_untouched(monkeypatch, options, seed, dtype):
    """The first of 12 sigmoid layers has some 1e-11 of each term's norm: all is as without a threshold."""

    def run():
        model = deep(seed=seed).to(dtype)
        optimizer = MTAdam(model.named_parameters(), lr=1e-3, **options)
        for x in inputs(20, dtype):
            output = model(x)
            take_step(
                optimizer, {"entropy": F.cross_entropy(output, (x[:, 0] > 0).long()), "size": output.square().mean()}
            )
        return model, optimizer

    model, optimizer = run()
    norms = torch.stack(list(optimizer.gradient_norms().values()))
    assert bool((norms[0] / norms.norm(dim=0) < 1e-7).all())
    assert bool((torch.stack(list(optimizer.scales().values())) > 0).all())
    monkeypatch.setattr(balancing, "ROUNDING", 0.0)
    for ours, theirs in zip(model.parameters(), run()[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_in_float64_a_small_real_gradient_is_balanced_beside_a_clear_one():
    """The first of 12 layers also has a term of its own: 1e-11 is far from rounding, 2e-16."""
    model = deep().double()
    optimizer = MTAdam(model.named_parameters(), lr=1e-3)
    for x in inputs(5, torch.float64):
        take_step(optimizer, {"fit": model(x).square().mean(), "first": (model[0](x) - 1).square().mean()})
    norms, scales = optimizer.gradient_norms(), optimizer.scales()
    assert norms["0.weight"][0] / torch.stack(list(norms.values()))[:, 0].norm() < 1e-10
    for layer in ("0.weight", "0.bias"):
        torch.testing.assert_close(scales[layer][1], norms[layer][0] / norms[layer][1], rtol=1e-12, atol=0)
        assert scales[layer][0] == 1


@pytest.mark.parametrize("importance", [0.0, 1.0])
def test_a_term_without_importance_silences_no_other(importance):
    """Else the first layers of a deep network, in fp32, would learn nothing."""
    model = deep()
    optimizer = MTAdam(model.named_parameters(), lr=1e-3, importance={"first": importance})
    for x in inputs(3, torch.float32):
        take_step(optimizer, {"fit": model(x).square().mean(), "first": (model[0](x) - 1).square().mean()})
    assert optimizer.scales()["0.weight"].tolist() == ([1, 0] if importance == 0 else [0, 1])


@dtypes
@pytest.mark.parametrize("dims", [1, 3])
def test_the_threshold_is_128_epsilons_of_a_terms_own_norm_beside_a_hundredfold(dims, dtype):
    """Both sides of both thresholds."""
    faint = 128 * torch.finfo(dtype).eps
    clear = 100 * faint

    def scale(first, second):
        parameters = [nn.Parameter(torch.zeros(dims, dtype=dtype)) for _ in range(2)]
        optimizer = MTAdam(parameters, lr=1e-3, anchor="b")
        a = parameters[0][0] * first + parameters[1][0]
        b = parameters[0][0] * second + parameters[1][0]
        take_step(optimizer, {"a": 1e3 * a, "b": b})
        return optimizer.scales()["parameter_0"].tolist()

    assert scale(0.9 * faint, 1.1 * clear) == [0, 1]
    assert scale(1.1 * faint, 1.1 * clear) == pytest.approx([clear / faint / 1e3, 1], rel=1e-3)
    assert scale(0.9 * faint, 0.9 * clear) == pytest.approx([clear / faint / 1e3, 1], rel=1e-3)
    assert scale(0.9 * faint, 1.0)[0] == 0
    assert scale(0.1 * faint, 0.1 * faint) == pytest.approx([1e-3, 1], rel=1e-3)


def test_in_bf16_noise_is_as_large_as_real_gradients_and_is_balanced():
    _, optimizer = trained(BeforeNorm(), torch.bfloat16, steps=1)
    norms = torch.stack(list(optimizer.gradient_norms().values()))
    assert 1e-5 < norms[1, 0] / norms[:, 0].norm() < 1e-2
    assert bool((optimizer.scales()["lin.bias"] > 0).all())


# The oracle


def noisy(steps, seed):
    """As ``stream``, with noise of "a" and "c" in the first layer, and of all terms in the scalar."""
    for found in stream(steps, seed):
        for term, gradients in found.items():
            for index in [0, 2] if term in ("a", "c") else [2]:
                if gradients[index] is not None:
                    gradients[index] = gradients[index] * 1e-16
        yield found


@pytest.mark.parametrize("anchor", ["first", "b", "mean", "max", "unit", None])
def test_with_noise_every_combination_equals_the_oracle(anchor):
    options = itertools.product(("first", "unbiased", "one"), ("max", "mean", "own", "sum"), ("sum", "mean"))
    for norm_init, denominator, update in options:
        chosen = {"anchor": anchor, "norm_init": norm_init, "denominator": denominator, "update": update}
        parameters, optimizer = make(start(0), **chosen)
        oracle = NaiveMTAdam(start(0), layer_names("parameter"), TERMS, **chosen)
        follow(optimizer, parameters, noisy(40, 0))
        for gradients in noisy(40, 0):
            oracle.step(gradients)
        for ours, theirs, name in zip(parameters, oracle.parameters, NAMES, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=1e-10, err_msg=f"{name} {chosen}")
        left_out = [scale == 0 for scale in optimizer.scales()["net.weight"]]
        assert left_out == [anchor is not None, False, anchor is not None]
