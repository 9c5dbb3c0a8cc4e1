"""The networks of CycleGAN: the ResNet generator and the 70x70 PatchGAN discriminator, both with instance norm.

They have the shapes and the number of parameters of https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix, so also its
biases in front of the normalisation, which takes them away again.
"""

from __future__ import annotations

from torch import Tensor, nn


def initialise(network: nn.Module) -> None:
    """Draw the weights of all convolutions from N(0, 0.02) and set their biases to 0."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _normalised(convolution: nn.Module, channels: int, activation: nn.Module) -> list[nn.Module]:
    return [convolution, nn.InstanceNorm2d(channels), activation]


def _reflected(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size of an image that is mirrored at its edges."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="reflect")


class Residual(nn.Module):
    """Two 3x3 convolutions, added to what enters: [B, C, H, W] to the same.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_normalised(_reflected(channels, channels, 3), channels, nn.ReLU(inplace=True)),
            _reflected(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        return x + self.layers(x)


class Generator(nn.Module):
    """Halves an image twice, passes residual blocks, doubles it twice: [B, 3, H, W] to the same, in [-1, 1].

    H and W are multiples of 4.

    Args:
        width: channels at the full size.
        blocks: residual blocks; the original takes 9 for images of 256 and 6 for images of 128.
    """

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        layers = _normalised(_reflected(3, width, 7), width, nn.ReLU(inplace=True))
        for channels in (width, 2 * width):
            halving = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
            layers += _normalised(halving, 2 * channels, nn.ReLU(inplace=True))
        layers += [Residual(4 * width) for _ in range(blocks)]
        for channels in (4 * width, 2 * width):
            doubling = nn.ConvTranspose2d(channels, channels // 2, 3, stride=2, padding=1, output_padding=1)
            layers += _normalised(doubling, channels // 2, nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers, _reflected(width, 3, 7), nn.Tanh())
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Translate."""
        translated: Tensor = self.layers(images)
        return translated


class Discriminator(nn.Module):
    """Scores patches of 70x70: [B, 3, H, W] to [B, 1, H/8 - 2, W/8 - 2].

    H and W are at least 24: below, the last normalisation would see a single value.

    Args:
        width: channels after the first convolution.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for channels, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            convolution = nn.Conv2d(channels, 2 * channels, 4, stride=stride, padding=1)
            layers += _normalised(convolution, 2 * channels, nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Score: 1 for real, 0 for made."""
        scores: Tensor = self.layers(images)
        return scores
