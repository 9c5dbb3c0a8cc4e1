"""The networks of CycleGAN: a ResNet as generator, a 70x70 PatchGAN as discriminator, both with instance norm.

They have the layers and the number of parameters of https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix, so also
the biases in front of the normalisation, which takes them away again.
"""

from __future__ import annotations

from torch import Tensor, nn

from example_projects.common.patchgan import PatchGAN, initialise


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


def check_size(size: int) -> None:
    """Raise unless both networks take images of this height and width.

    Raises:
        ValueError: they don't.
    """
    if size % 4 or size < 24:
        raise ValueError(
            "The generators halve and double images twice, and the discriminators need 24 pixels: the size must be 24,"
            f" 28, 32, ..., but is {size}. Give another --image-size."
        )


def discriminator(width: int = 64) -> PatchGAN:
    """A 70x70 PatchGAN. Below 24x24 its last normalisation would see a single value."""
    network = PatchGAN(3, width, norm=nn.InstanceNorm2d, bias=True)
    initialise(network)
    return network
