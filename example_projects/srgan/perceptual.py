"""The perceptual loss: how far apart two images are for a fixed VGG network.

The network is no part of the module that is trained: it enters neither checkpoints nor optimizers.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VGG19_Weights, vgg16, vgg19

from lightning_mtadam.metrics.features import IMAGENET_MEAN, IMAGENET_STD

RANDOM = Path("random")  # in place of a file

# The layers up to the rectified last convolution, conv5_4 of VGG19 or conv5_3 of VGG16, by the number of convolutions.
NETWORKS = {13: ("VGG16", vgg16, 30), 16: ("VGG19", vgg19, 36)}

REMEDY = (
    "Give --perceptual-weights a file with the convolutions of torchvision's VGG19 or VGG16 (a state dict with keys as"
    " 'features.0.weight'), or 'random' to try the program with a network that has learnt nothing."
)


class PerceptualLoss:
    """The mean squared difference of a network's features. Not an ``nn.Module``, so that no module registers it.

    Args:
        features: takes normalised RGB [B, 3, H, W].
        name: of the network.
    """

    def __init__(self, features: nn.Module, name: str) -> None:
        self.features, self.name = features.eval().requires_grad_(False), name
        self.mean, self.deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))

    def to(self, device: torch.device) -> PerceptualLoss:
        """Move the network."""
        self.features, self.mean, self.deviation = (
            part.to(device) for part in (self.features, self.mean, self.deviation)
        )
        return self

    def __call__(self, made: Tensor, truth: Tensor) -> Tensor:
        """Compare.

        Args:
            made: [B, 3, H, W], in [-1, 1].
            truth: the same; no gradient goes to it.

        Returns:
            A scalar.
        """
        with torch.no_grad():
            wanted = self.features(self._normalise(truth))
        return F.mse_loss(self.features(self._normalise(made)), wanted)

    def _normalise(self, images: Tensor) -> Tensor:
        return ((images.float() + 1) / 2 - self.mean) / self.deviation


def make_perceptual_loss(weights: Path | None, *, for_trial: bool) -> tuple[PerceptualLoss, str]:
    """The loss of the given weights, and a sentence that says which they are.

    Args:
        weights: a file, or ``RANDOM``; torchvision's VGG19 if ``None``, downloaded unless it is there.
        for_trial: whether, where that cannot be had, a network of random weights may take its place.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not what is wanted.
        OSError: torchvision's VGG19 cannot be had and this is no trial.
    """
    if weights == RANDOM:
        return random_vgg(), "The perceptual loss is of a VGG19 with RANDOM weights, as asked: for trials only."
    if weights is not None:
        loss = read_vgg(weights)
        return loss, f"The perceptual loss is of {loss.name}, from {weights}."
    try:
        state = VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        missing = (
            f"torchvision's VGG19, of which the perceptual loss is made, could not be had from"
            f" {VGG19_Weights.IMAGENET1K_V1.url} ({error})."
        )
        if not for_trial:
            raise OSError(f"{missing} {REMEDY}") from error
        return random_vgg(), f"{missing} Its place is taken by one with RANDOM weights: for trials only. {REMEDY}"
    return vgg(state, "torchvision's weights"), "The perceptual loss is of torchvision's VGG19."


def read_vgg(file: Path) -> PerceptualLoss:
    """Read the convolutions of VGG16 or VGG19 from a state dict of torchvision's names, in any floating dtype.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}. {REMEDY}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} cannot be read as weights ({type(error).__name__}). {REMEDY}") from error
    return vgg(state, str(file))


def vgg(state: Any, source: str) -> PerceptualLoss:
    """The loss of these weights.

    Raises:
        ValueError: they are not those of VGG16 or VGG19.
    """
    prefix = "features."
    found = {
        name.removeprefix(prefix): value.float()
        for name, value in (state.items() if isinstance(state, dict) else ())
        if name.startswith(prefix)
    }
    convolutions = sum(value.dim() == 4 for value in found.values())
    if convolutions not in NETWORKS:
        raise ValueError(f"{source} has {convolutions} convolutions; VGG16 has 13, VGG19 has 16. {REMEDY}")
    features, name = empty_features(convolutions)
    try:
        features.load_state_dict(found, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source} does not hold the convolutions of {name}: {error}. {REMEDY}") from error
    return PerceptualLoss(features, name)


def random_vgg() -> PerceptualLoss:
    """The loss of a VGG19 with random weights, the same each time, that keep the magnitude of what they take."""
    features, name = empty_features(16)
    features = features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    return PerceptualLoss(features, f"random {name}")


def empty_features(convolutions: int) -> tuple[nn.Sequential, str]:
    """The layers of the VGG network with so many convolutions, without memory, and its name."""
    name, build, layers = NETWORKS[convolutions]
    with torch.device("meta"):
        return build().features[:layers], name
