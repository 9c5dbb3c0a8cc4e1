"""A variational autoencoder of MNIST images with a classifier: three losses, one of which lives in the encoder only."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from example_projects.evidence.problems.images import BATCH, PIXELS, Labelled, error_rates, read_images
from example_projects.evidence.problems.problem import Part, Problem, seeded, shuffled_batches
from example_projects.mnist.data import DEVIATION
from example_projects.mnist.module import CLASSES

CODE = 16
USUAL_ERROR, USUAL_COST = 4.0, 0.02  # after long training with good weights


class VAEClassifier(nn.Module):
    """196-128-(16 means, 16 log variances), a sample of 16, then 128-196, with a linear classifier on the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, 2 * CODE))
        self.decoder = nn.Sequential(nn.Linear(CODE, 128), nn.ReLU(), nn.Linear(128, PIXELS))
        self.classifier = nn.Linear(CODE, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 196] to reconstructions, [B, 196], logits, [B, 10], and Kullback-Leibler divergences in nats, [B]."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(code), self.classifier(code), divergence


def losses(network: nn.Module, batch: Labelled) -> dict[str, Tensor]:
    """Mean square error of the pixels, from 0 to 1; the divergence; and cross entropy."""
    images, labels = batch
    reconstruction, logits, divergence = network(images)
    return {
        "reconstruction": F.mse_loss(reconstruction, images) * DEVIATION**2,
        "kl": divergence.mean(),
        "classification": F.cross_entropy(logits, labels),
    }


@torch.no_grad()
def measure(network: nn.Module, part: Labelled) -> dict[str, float]:
    """The square error, the divergence, wrong classes in percent, and two that join them.

    "cost" joins the first two without a weight of one's own choice: with the best variance of the decoder, the bound of
    the negative log-likelihood is ``D / 2 log(mse) + KL`` for D pixels, up to a constant; the cost is
    ``mse exp(2 KL / D)``, which falls where the bound does. "joint_error" is the mean of the cost and of the wrong
    classes, each over what is usual.

    References:
        Rybkin, Daniilidis, Levine: Simple and Effective VAE Training with Calibrated Decoders, ICML 2021 (the bound).
    """
    images, labels = part
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reconstruction, logits, divergence = network(images)
    mse, kl = F.mse_loss(reconstruction, images).item() * DEVIATION**2, divergence.mean().item()
    cost = mse * math.exp(min(2 * kl / PIXELS, 100.0))
    error = error_rates(logits, labels)["error"]
    return {"joint_error": (error / USUAL_ERROR + cost / USUAL_COST) / 2, "error": error, "mse": mse, "kl": kl}


def vae(folder: Path) -> Problem:
    """The problem.

    Failed: the divergence has collapsed, to less than a nat; one image in five is taken for another class; or less than
    a quarter of the pixels' variance is explained.
    """
    data = read_images(folder)
    variance = data.test[0].var(0).mean().item() * DEVIATION**2

    def measure_part(network: nn.Module, part: Part) -> dict[str, float]:
        return measure(network, data.part(part))

    return Problem(
        name="vae",
        make_network=partial(seeded, VAEClassifier),
        batches=partial(shuffled_batches, data.train, BATCH),
        losses=losses,
        terms=("reconstruction", "kl", "classification"),
        anchor="reconstruction",
        shared="encoder.2",
        measure=measure_part,
        figure="joint_error",
        higher_is_better=False,
        allowed={"error": (0, 20), "mse": (0, 0.75 * variance), "kl": (1, math.inf)},
        steps=800,
    )
