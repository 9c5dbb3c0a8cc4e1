"""MNIST images that are encoded, reconstructed and classified: two losses of different kinds on one encoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from example_projects.evidence.problems.images import BATCH, PIXELS, Labelled, error_rates, read_images
from example_projects.evidence.problems.problem import Problem, seeded, shuffled_batches
from example_projects.mnist.module import CLASSES

CODE = 16
USUAL_ERROR, USUAL_MSE = 2.2, 0.125  # after long training with good weights: percent, and of normalised pixels


class AutoencoderClassifier(nn.Module):
    """196-128-16-128-196, with a linear classifier on the code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, CODE))
        self.decoder = nn.Sequential(nn.Linear(CODE, 128), nn.ReLU(), nn.Linear(128, PIXELS))
        self.classifier = nn.Linear(CODE, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 196] to reconstructions, [B, 196], and logits, [B, 10]."""
        code = self.encoder(images)
        return self.decoder(code), self.classifier(code)


def losses(network: nn.Module, batch: Labelled) -> dict[str, Tensor]:
    """Mean square error of the pixels, and cross entropy."""
    images, labels = batch
    reconstruction, logits = network(images)
    return {
        "reconstruction": F.mse_loss(reconstruction, images),
        "classification": F.cross_entropy(logits, labels),
    }


@torch.no_grad()
def measure(network: nn.Module, part: Labelled) -> dict[str, float]:
    """Wrong classes in percent, the square error, and the mean of both, each over what is usual."""
    images, labels = part
    reconstruction, logits = network(images)
    error, mse = error_rates(logits, labels)["error"], F.mse_loss(reconstruction, images).item()
    return {"joint_error": (error / USUAL_ERROR + mse / USUAL_MSE) / 2, "error": error, "mse": mse}


def autoencoder(folder: Path) -> Problem:
    """The problem.

    Failed: one image in five is taken for another class, or less than a quarter of the pixels' variance is explained.
    """
    data = read_images(folder)
    variance = data.test[0].var(0).mean().item()
    return Problem(
        name="autoencoder",
        make_network=partial(seeded, AutoencoderClassifier),
        batches=partial(shuffled_batches, data.train, BATCH),
        losses=losses,
        terms=("reconstruction", "classification"),
        anchor="reconstruction",
        shared="encoder.2",
        measure=lambda network, part: measure(network, data.part(part)),
        figure="joint_error",
        higher_is_better=False,
        allowed={"error": (0, 20), "mse": (0, 0.75 * variance)},
        steps=600,
    )
