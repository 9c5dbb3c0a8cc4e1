"""The networks of SRGAN (Ledig et al., CVPR 2017, arXiv 1609.04802), figure 4."""

from __future__ import annotations

from torch import Tensor, nn

SCALE = 4
SHRINKAGE = 16  # of the discriminator: four convolutions of stride 2


class ResidualBlock(nn.Module):
    """Two convolutions beside an identity: [B, C, H, W] to [B, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.PReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Add what the body finds."""
        return features + self.body(features)


class Generator(nn.Module):
    """SRResNet: images [B, 3, H, W] in [-1, 1] to images [B, 3, 4H, 4W], meant to be in [-1, 1].

    Args:
        width: channels, 64 in the paper.
        blocks: residual blocks, 16 in the paper.
    """

    def __init__(self, width: int = 64, blocks: int = 16) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, width, 9, padding=4), nn.PReLU())
        self.body = nn.Sequential(
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
        )
        self.tail = nn.Sequential(*upscaling(width), *upscaling(width), nn.Conv2d(width, 3, 9, padding=4))

    def forward(self, low: Tensor) -> Tensor:
        """Upscale."""
        features = self.head((low + 1) / 2)  # the paper's range of inputs is [0, 1]
        return self.tail(features + self.body(features))


def upscaling(width: int) -> list[nn.Module]:
    """Twice the height and the width: a convolution to four times the channels, which become pixels."""
    return [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()]


class Discriminator(nn.Module):
    """Real or made: images [B, 3, S, S] in [-1, 1] to logits [B, 1].

    Args:
        image_size: S, a multiple of 16, at least 32; 96 in the paper.
        width: channels of the first convolution, 64 in the paper.

    Raises:
        ValueError: the size is another.
    """

    def __init__(self, image_size: int = 96, width: int = 64) -> None:
        super().__init__()
        if image_size < 2 * SHRINKAGE or image_size % SHRINKAGE:
            raise ValueError(
                f"image_size must be 32 or a larger multiple of {SHRINKAGE}, by which the discriminator shrinks images,"
                f" but is {image_size}."
            )
        channels = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            *(
                layer
                for index in range(1, 8)
                for layer in (
                    nn.Conv2d(channels[index - 1], channels[index], 3, stride=1 + index % 2, padding=1),
                    nn.BatchNorm2d(channels[index]),
                    nn.LeakyReLU(0.2),
                )
            ),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(8 * width * (image_size // SHRINKAGE) ** 2, 16 * width),
            nn.LeakyReLU(0.2),
            nn.Linear(16 * width, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Judge."""
        return self.classifier(self.convolutions(images))
