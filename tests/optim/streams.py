"""Streams of gradients that are fed to an optimizer and to its oracle alike."""

import numpy as np
import torch

from lightning_mtadam.optim import MTAdam
from tests.loops import train

TERMS = ("a", "b", "c")
NAMES = ("net.weight", "net.bias", "net.scale", "net.empty", "head.weight", "head.bias")
SHAPES = ((4, 3), (4,), (), (0, 2), (2, 4), (2,))
LENGTH = 60
"""Steps after which everything that happens in a stream has happened."""


def layer_names(rule):
    groups = ["group_0"] * 4 + ["group_1"] * 2
    return {
        "parameter": list(NAMES),
        "module": [name.split(".")[0] for name in NAMES],
        "group": groups,
        "global": ["global"] * len(NAMES),
    }[rule]


def stream(steps, seed, *, scale=(1.0, 30.0, 0.02)):
    """Per step, a gradient or None for each parameter of each term that is present.

    "c" starts late and is absent for a while, "b" never reaches the first bias and reaches the head late, the anchor
    "a" never reaches the head's bias, and some gradients are zero.
    """
    generator = np.random.default_rng(seed)
    for step in range(steps):
        found = {}
        for term, factor in zip(TERMS, scale, strict=True):
            gradients = [np.asarray(factor * generator.normal(size=shape) * (1 + 0.01 * step)) for shape in SHAPES]
            if term == "a":
                gradients[5] = None
            if term == "b":
                gradients[1] = None
                if step < 20:
                    gradients[4], gradients[5] = None, np.zeros(SHAPES[5])
            if term == "c" and (step < 7 or 36 <= step < 48):
                continue
            if term != "b" and 30 <= step < 34:
                gradients = [None if g is None else np.zeros_like(g) for g in gradients]
            if 52 <= step < 55:
                gradients[2] = None
            found[term] = gradients
        yield dict(reversed(found.items())) if step % 5 == 3 else found


def start(seed):
    generator = np.random.default_rng(seed)
    return [np.asarray(generator.normal(size=shape)) for shape in SHAPES]


def linear_losses(parameters, gradients):
    """Losses with exactly these gradients; a loss hangs only on the parameters that it has a gradient for."""
    losses = {}
    for term, found in gradients.items():
        reached = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
        flat = torch.cat([p.reshape(-1) for p, _ in reached])
        losses[term] = flat @ torch.as_tensor(np.concatenate([g.ravel() for _, g in reached]), dtype=flat.dtype)
    return losses


def feed(optimizer, parameters, gradients):
    optimizer.zero_grad()
    optimizer.backward(linear_losses(parameters, gradients))


def follow(optimizer, parameters, gradients, *, clip=None):
    """A step on each of the gradients, clipped by a kind and a limit, as the oracles take them."""
    train(optimizer, (linear_losses(parameters, found) for found in gradients), clip=clip and clip[::-1])


def make(values, *, rule="parameter", second_group=None, dtype=torch.float64, **options):
    parameters = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in values]
    named = list(zip(NAMES, parameters, strict=True))
    groups = [{"params": named[:4]}, {"params": named[4:], **(second_group or {})}]
    return parameters, MTAdam(groups, terms=TERMS, layers=rule, **options)
