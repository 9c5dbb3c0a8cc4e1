"""MNIST images that are encoded, reconstructed and classified: two losses of different kinds on one encoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from example_projects.mnist.module import CLASSES
from example_projects.problems.digits import BATCH, PIXELS, error_rates, read_pixels
from example_projects.problems.problem import Problem, seeded, shuffled_batches

CODE = 16

# What Adam with the best hand weight reaches: percent of the test images, and mean square of normalised pixels.
USUAL_ERROR, USUAL_MSE = 2.2, 0.125


class AutoencoderClassifier(nn.Module):
    """196-128-16-128-196, with a linear classifier on the code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, CODE))
        self.decoder = nn.Sequential(nn.Linear(CODE, 128), nn.ReLU(), nn.Linear(128, PIXELS))
        self.classifier = nn.Linear(CODE, CLASSES)
        self.both = nn.Identity()  # what it gives is all output as one tensor, for methods that balance there

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 196] to reconstructions, [B, 196], and logits, [B, 10]."""
        code = self.encoder(images)
        output = self.both(torch.cat([self.decoder(code), self.classifier(code)], dim=1))
        return output[:, :PIXELS], output[:, PIXELS:]


def losses(network: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Mean square error of the pixels, and cross entropy."""
    images, labels = batch
    reconstruction, logits = network(images)
    return {
        "reconstruction": F.mse_loss(reconstruction, images),
        "classification": F.cross_entropy(logits, labels),
    }


@torch.no_grad()
def metrics(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Test error and reconstruction error, and the mean of both, each over what is usual."""
    reconstruction, _ = network(images)
    error = error_rates(lambda rows: network(rows)[1], images, labels)["test_error"]
    mse = F.mse_loss(reconstruction, images).item()
    return {"joint_error": (error / USUAL_ERROR + mse / USUAL_MSE) / 2, "test_error": error, "reconstruction_mse": mse}


def autoencoder(folder: Path) -> Problem:
    """The problem, with the data from a folder with MNIST's four idx files."""
    train, test = read_pixels(folder, "train"), read_pixels(folder, "test")
    return Problem(
        name="autoencoder",
        make_network=partial(seeded, AutoencoderClassifier),
        batches=partial(shuffled_batches, train, BATCH),
        losses=losses,
        anchor="reconstruction",
        balanced_weights={"reconstruction": 1.0, "classification": 1.0},
        given_weights=lambda seed: {"reconstruction": 1.0, "classification": 1.0},
        metrics=lambda network: metrics(network, *test),
        metric_name="joint_error",
        higher_is_better=False,
        steps=2000,
    )
