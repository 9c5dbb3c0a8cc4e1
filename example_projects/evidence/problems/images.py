"""MNIST at half its size, in three parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from example_projects.evidence.problems.problem import Part
from example_projects.mnist.data import read_split
from example_projects.mnist.module import CLASSES

BATCH = 64
PIXELS = 14 * 14
HELD_OUT = 6  # of the training images one in so many is for validation

Labelled = tuple[Tensor, Tensor]  # images [N, ...] and labels [N]


@dataclass(frozen=True)
class Images:
    """The three parts: images with labels."""

    train: Labelled
    validation: Labelled
    test: Labelled

    def part(self, name: Part) -> Labelled:
        """The part that a network is measured on."""
        return self.validation if name == "validation" else self.test


def read_images(folder: Path, *, small: bool = True) -> Images:
    """Read MNIST; the last sixth of the training images is the validation part.

    Args:
        folder: with MNIST's four idx files.
        small: whether to halve the images' size, and flatten them: [N, 196] in place of [N, 1, 28, 28].
    """

    def read(split: str) -> Labelled:
        images, labels = read_split(folder, split).tensors
        return (F.avg_pool2d(images, 2).flatten(1) if small else images), labels

    images, labels = read("train")
    kept = len(labels) - len(labels) // HELD_OUT
    return Images((images[:kept], labels[:kept]), (images[kept:], labels[kept:]), read("test"))


def error_rates(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent of the images, and of those of the worst class, that are taken for another class."""
    wrong = (logits.argmax(1) != labels).double()
    per_class = [wrong[labels == label].mean().item() for label in range(CLASSES)]
    return {"error": 100 * wrong.mean().item(), "worst_class_error": 100 * max(per_class)}


@torch.no_grad()
def in_pieces(network: nn.Module, images: Tensor, size: int = 2000) -> Tensor:
    """What the network makes of many images, piece by piece."""
    return torch.cat([network(piece) for piece in images.split(size)])
