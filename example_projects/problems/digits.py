"""MNIST with one loss per class."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from example_projects.mnist.__main__ import class_weights
from example_projects.mnist.data import read_split
from example_projects.mnist.module import CLASSES, TERMS, class_losses
from example_projects.problems.problem import Problem, seeded, shuffled_batches

BATCH = 64
PIXELS = 14 * 14


def read_pixels(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """The normalised images at half their size, flattened, [N, 196], and the labels, [N]."""
    images, labels = read_split(folder, split).tensors
    return F.avg_pool2d(images, 2).flatten(1), labels


def make_classifier() -> nn.Module:
    """196-128-10."""
    return nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def losses(network: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """One term per class; they add up to the mean cross entropy."""
    images, labels = batch
    log_probabilities = F.log_softmax(network(images), dim=1)
    return class_losses(log_probabilities, labels, log_probabilities.new_ones(CLASSES))


def given_weights(seed: int) -> dict[str, float]:
    """1 for the first class and U(0, 1000) for the others, as in the authors' code."""
    return dict(zip(TERMS, class_weights("code", seed).tolist(), strict=True))


@torch.no_grad()
def error_rates(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent of the images, and of those of the worst class, that are taken for another class."""
    wrong = (network(images).argmax(1) != labels).double()
    per_class = [wrong[labels == label].mean().item() for label in range(CLASSES)]
    return {"test_error": 100 * wrong.mean().item(), "worst_class_error": 100 * max(per_class)}


def digits(folder: Path) -> Problem:
    """The problem, with the data from a folder with MNIST's four idx files."""
    train, test = read_pixels(folder, "train"), read_pixels(folder, "test")
    return Problem(
        name="digits",
        make_network=partial(seeded, make_classifier),
        batches=partial(shuffled_batches, train, BATCH),
        losses=losses,
        anchor="mean",
        balanced_weights=dict.fromkeys(TERMS, 1.0),
        given_weights=given_weights,
        metrics=lambda network: error_rates(network, *test),
        metric_name="test_error",
        higher_is_better=False,
        steps=2000,
    )
