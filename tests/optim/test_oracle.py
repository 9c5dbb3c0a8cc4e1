"""MTAdam equals an independent naive float64 implementation, for every combination of options."""

import itertools

import numpy as np
import pytest

from tests.optim.streams import NAMES, TERMS, feed, layer_names, make, start, stream
from tests.oracles.naive_mtadam import NaiveMTAdam

STEPS = 200
TOLERANCE = 1e-10


def assert_equal(optimizer, parameters, oracle, layers):
    for ours, theirs, name in zip(parameters, oracle.parameters, NAMES, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=TOLERANCE, err_msg=name)
    weights, scales = optimizer.balance_weights(), optimizer.scales()
    for layer in dict.fromkeys(layers):
        expected = [oracle.balance_weight(i, layer) for i in range(len(TERMS))]
        np.testing.assert_allclose(weights[layer].numpy(), expected, rtol=1e-9, err_msg=layer)
        expected = [oracle.scale[i, layer] for i in range(len(TERMS))]
        np.testing.assert_allclose(scales[layer].numpy(), expected, rtol=1e-9, err_msg=layer)


def compare(rule, *, steps=STEPS, seed=0, lr=1e-3, second_group=None, clip=None, **options):
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
    for gradients in stream(steps, seed):
        feed(optimizer, parameters, gradients)
        if clip is not None:
            optimizer.clip_gradients(clip[1], clip[0])
        optimizer.step()
        oracle.step(gradients, clip)
    if clip is None:
        assert_equal(optimizer, parameters, oracle, layers)
    else:
        for ours, theirs in zip(parameters, oracle.parameters, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rule", ["parameter", "module", "group", "global"])
@pytest.mark.parametrize("anchor", ["first", "b", "mean", "max", "unit", None])
def test_every_combination_equals_the_oracle(rule, anchor):
    for norm_init, denominator, update in itertools.product(
        ("first", "unbiased", "one"), ("max", "mean", "own"), ("sum", "mean")
    ):
        compare(rule, anchor=anchor, norm_init=norm_init, denominator=denominator, update=update)
