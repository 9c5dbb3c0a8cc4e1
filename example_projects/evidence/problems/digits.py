"""MNIST with one loss per class: small, and in full."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from example_projects.evidence.problems.images import (
    BATCH,
    PIXELS,
    Images,
    Labelled,
    error_rates,
    in_pieces,
    read_images,
)
from example_projects.evidence.problems.problem import Problem, seeded, shuffled_batches
from example_projects.mnist.module import CLASSES, TERMS, class_losses
from example_projects.mnist.network import Net


def make_classifier() -> nn.Module:
    """196-128-10."""
    return nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def losses(network: nn.Module, batch: Labelled) -> dict[str, Tensor]:
    """One term per class; they add up to the mean cross entropy."""
    images, labels = batch
    log_probabilities = F.log_softmax(network(images), dim=1)
    return class_losses(log_probabilities, labels, log_probabilities.new_ones(CLASSES))


def digits(folder: Path) -> Problem:
    """A small network on images of half the size.

    Failed: a tenth of the images is wrong, as with one class lost; or half of a class is.
    """
    return _classes(read_images(folder))


def mnist(folder: Path) -> Problem:
    """The mnist project's network for an epoch of the full images. Failed: as for the digits."""
    data = read_images(folder, small=False)
    return replace(
        _classes(data),
        name="mnist",
        make_network=partial(seeded, Net),
        shared="fc2",
        steps=len(data.train[1]) // BATCH,
        lrs=(1e-4, 1e-2),
    )


def _classes(data: Images) -> Problem:
    return Problem(
        name="digits",
        make_network=partial(seeded, make_classifier),
        batches=partial(shuffled_batches, data.train, BATCH),
        losses=losses,
        terms=TERMS,
        anchor="mean",
        shared="2",
        measure=lambda network, part: _measure(network, data.part(part)),
        figure="error",
        higher_is_better=False,
        allowed={"error": (0, 10), "worst_class_error": (0, 50)},
        steps=400,
    )


def _measure(network: nn.Module, part: Labelled) -> dict[str, float]:
    images, labels = part
    return error_rates(in_pieces(network, images), labels)
