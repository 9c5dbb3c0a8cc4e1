"""MTAdam equals an independent naive float64 implementation, for every combination of options."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_mtadam import layout
from lightning_mtadam.optim import MTAdam
from tests.combinations import every, meeting
from tests.optim.streams import LENGTH, NAMES, TERMS, feed, follow, layer_names, make, start, stream
from tests.oracles.naive_mtadam import NaiveMTAdam

TOLERANCE = 1e-10
RULES = ("parameter", "module", "group", "global")
ANCHORS = ("first", "b", "mean", "max", "unit", None)
CHOICES = (RULES, ANCHORS, ("first", "unbiased", "one"), ("max", "mean", "own", "sum"), ("sum", "mean"))
"""Of rule, anchor, norm_init, denominator and update."""
few = settings(max_examples=settings.default.max_examples // 2)


def assert_parameters(parameters, oracle, layers, tolerance=TOLERANCE):
    for ours, theirs, rounding, name in zip(parameters, oracle.parameters, oracle.rounding, layers, strict=True):
        missed = np.abs(ours.detach().double().numpy() - theirs)
        assert np.all(missed <= tolerance + rounding), f"{name} misses the oracle by {missed}"


def assert_equal(optimizer, parameters, oracle, layers):
    assert_parameters(parameters, oracle, NAMES)
    weights, scales = optimizer.balance_weights(), optimizer.scales()
    for layer in dict.fromkeys(layers):
        expected = [oracle.balance_weight(i, layer) for i in range(len(TERMS))]
        np.testing.assert_allclose(weights[layer].numpy(), expected, rtol=1e-9, err_msg=layer)
        expected = [oracle.scale[i, layer] for i in range(len(TERMS))]
        np.testing.assert_allclose(scales[layer].numpy(), expected, rtol=1e-9, err_msg=layer)


def compare(rule, *, steps=LENGTH, seed=0, lr=1e-3, second_group=None, clip=None, **options):
    second_group = second_group or {}
    layers = layer_names(rule)
    parameters, optimizer = make(start(seed), rule=rule, second_group=second_group, lr=lr, **options)
    betas, decay = options.pop("betas", (0.9, 0.999, 0.9)), options.pop("weight_decay", 0.0)
    oracle = NaiveMTAdam(
        start(seed),
        layers,
        TERMS,
        lr=[lr] * 4 + [second_group.get("lr", lr)] * 2,
        betas=[betas] * 4 + [second_group.get("betas", betas)] * 2,
        weight_decay=[decay] * 4 + [second_group.get("weight_decay", decay)] * 2,
        **options,
    )
    follow(optimizer, parameters, stream(steps, seed), clip=clip)
    for gradients in stream(steps, seed):
        oracle.step(gradients, clip)
    if clip is None:
        assert_equal(optimizer, parameters, oracle, layers)
    else:
        assert_parameters(parameters, oracle, NAMES)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("anchor", ANCHORS)
def test_every_three_options_together_equal_the_oracle(rule, anchor):
    assert meeting(3, every(4, *CHOICES), *CHOICES)
    for *chosen, norm_init, denominator, update in every(4, *CHOICES):
        if chosen == [rule, anchor]:
            compare(rule, anchor=anchor, norm_init=norm_init, denominator=denominator, update=update)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("anchor", ANCHORS)
def test_every_other_combination_equals_the_oracle(rule, anchor):
    for *chosen, norm_init, denominator, update in every(4, *CHOICES, others=True):
        if chosen == [rule, anchor]:
            compare(rule, anchor=anchor, norm_init=norm_init, denominator=denominator, update=update)


@pytest.mark.slow
@pytest.mark.parametrize("denominator", ["max", "mean", "own", "sum"])
def test_many_steps_equal_the_oracle(denominator):
    compare("parameter", steps=600, anchor="mean", denominator=denominator)


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize("anchor", ["first", "mean", None])
@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"amsgrad": True, "denominator": "own"},
        {"amsgrad": True, "denominator": "sum"},
        {"maximize": True},
        {"weight_decay": 0.1},
        {"max_scale": 0.5},
        {"importance": {"b": 0.25, "c": 2.0}},
        {"eps": 1e-3, "betas": (0.5, 0.9, 0.0)},
        {"betas": (0.0, 0.99, 0.99)},
        {"lr": 0.05, "second_group": {"lr": 1e-3, "weight_decay": 0.3, "betas": (0.8, 0.99, 0.5)}},
        {"lr": 0.05, "second_group": {"betas": (0.8, 0.99, 0.5)}, "rule": "global", "norm_init": "unbiased"},
        {"clip": ("norm", 0.7)},
        {"clip": ("value", 0.05)},
        {"clip": ("value", 0.05), "denominator": "own"},
        {"clip": ("value", 0.05), "denominator": "sum"},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_other_option_equals_the_oracle(options, anchor):
    compare(**{"rule": "parameter", "anchor": anchor, **options})


CANCELLING = {"shapes": [()] * 3, "missing": 0.3, "denominator": "sum", "norm_init": "first", "together": False}
"""Of two opposed terms nothing but their rounding is left, at a layer's first step."""


@few
@example(seed=4739, anchor="first", **CANCELLING)
@example(seed=4, anchor="mean", **CANCELLING)
@given(
    seed=st.integers(0, 10_000),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4),
    missing=st.floats(0, 0.6),
    anchor=st.sampled_from(["first", "b", "mean", "max", "unit", None]),
    denominator=st.sampled_from(["max", "mean", "own", "sum"]),
    norm_init=st.sampled_from(["first", "unbiased", "one"]),
    together=st.booleans(),
)
def test_random_shapes_and_random_gaps_equal_the_oracle(
    seed, shapes, missing, anchor, denominator, norm_init, together
):
    generator = np.random.default_rng(seed)
    values = [np.asarray(generator.normal(size=shape)) for shape in shapes]
    parameters = [torch.tensor(value, requires_grad=True) for value in values]
    options = {"anchor": anchor, "denominator": denominator, "norm_init": norm_init, "lr": 0.01}
    optimizer = MTAdam(parameters, terms=TERMS, layers="global" if together else "parameter", **options)
    layers = ["global"] * len(shapes) if together else [f"parameter_{index}" for index in range(len(shapes))]
    oracle = NaiveMTAdam(values, layers, TERMS, **options)
    for _ in range(30):
        found = {}
        for term in TERMS:
            if generator.random() < missing:
                continue
            gradients = [np.asarray(10.0 * generator.normal(size=shape)) for shape in shapes]
            kept = [None if generator.random() < missing else gradient for gradient in gradients]
            if any(gradient is not None for gradient in kept):
                found[term] = kept
        if found:
            feed(optimizer, parameters, found)
            optimizer.step()
            oracle.step(found)
    assert_parameters(parameters, oracle, layers)


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.02)])
def test_narrow_dtypes_follow_the_oracle(dtype, tolerance):
    parameters, optimizer = make(start(0), dtype=dtype)
    oracle = NaiveMTAdam([p.detach().double().numpy() for p in parameters], layer_names("parameter"), TERMS)
    follow(optimizer, parameters, stream(40, 0))
    for gradients in stream(40, 0):
        oracle.step(gradients)
    for ours, theirs in zip(parameters, oracle.parameters, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.detach().double().numpy(), theirs, rtol=0, atol=tolerance)
    assert all(norms.dtype == torch.float32 for norms in optimizer.gradient_norms().values())


def test_layers_of_a_callable_equal_the_rule_it_states():
    by_rule, by_function = (
        make(start(0), rule=rule) for rule in ("module", lambda name: name.rpartition(".")[0].upper())
    )
    for parameters, optimizer in (by_rule, by_function):
        follow(optimizer, parameters, stream(40, 0))
    for ours, theirs in zip(by_rule[0], by_function[0], strict=True):
        assert ours.detach().equal(theirs.detach())
    assert list(by_function[1].balance_weights()) == ["NET", "HEAD"]


def test_blocks_cover_large_small_and_strided_parameters(monkeypatch):
    """Cut into blocks of five elements, every parameter is split or joined otherwise; nothing changes."""

    def run(limit):
        monkeypatch.setattr("lightning_mtadam.optim.update.BLOCK", limit)
        monkeypatch.setattr(layout, "PACKED", limit // 2)
        monkeypatch.setattr(layout, "PACK", limit)
        values = [*start(0)]
        parameters, optimizer = make(values, amsgrad=True)
        strided = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
        strided.requires_grad_()
        optimizer.add_param_group({"params": [("conv.weight", strided)]})
        gradients = (
            {
                term: [*found, np.sin(np.arange(24.0) * (index + 1)).reshape(2, 3, 2, 2)]
                for index, (term, found) in enumerate(terms.items())
            }
            for terms in stream(30, 0)
        )
        follow(optimizer, [*parameters, strided], gradients, clip=("norm", 0.5))
        return [p.detach() for p in (*parameters, strided)]

    for ours, theirs in zip(run(5), run(10_000), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
