"""The discriminator of pix2pix and CycleGAN, their initial weights and their GAN losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchGAN(nn.Sequential):
    """Judges every patch of an image by itself: [B, C, H, W] to logits [B, 1, H', W'].

    With three layers a patch has 70x70 pixels, as in both papers.

    Args:
        channels: of the image; of pix2pix those of the condition too.
        width: channels of the first layer.
        layers: those of stride two.
        norm: makes the normalisation of so many channels.
        bias: whether convolutions that are normalised have one.
    """

    def __init__(
        self, channels: int, width: int = 64, layers: int = 3, *, norm: Callable[[int], nn.Module], bias: bool = False
    ) -> None:
        steps: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = width
        for index in range(1, layers + 1):
            now = width * min(2**index, 8)
            steps += [nn.Conv2d(before, now, 4, 2 if index < layers else 1, 1, bias=bias), norm(now), nn.LeakyReLU(0.2)]
            before = now
        super().__init__(*steps, nn.Conv2d(before, 1, 4, 1, 1))


def initialise(network: nn.Module) -> None:
    """Draw weights from N(0, 0.02), scales of normalisations from N(1, 0.02), as both originals do; biases are 0."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def log_loss(logits: Tensor, *, real: bool) -> Tensor:
    """The GAN loss of pix2pix: cross entropy of the patches with "real" or "fake". [...] -> scalar."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def square_loss(logits: Tensor, *, real: bool) -> Tensor:
    """The GAN loss of CycleGAN: the mean square distance from 1 (real) or 0 (fake). [...] -> scalar."""
    return F.mse_loss(logits, torch.full_like(logits, float(real)))
