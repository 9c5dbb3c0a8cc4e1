"""The U-Net of pix2pix (the discriminator is in :mod:`example_projects.common.patchgan`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchStatistics(nn.BatchNorm2d):
    """Batch normalisation by the statistics of the batch in evaluation too, as pix2pix is used; it keeps none."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)


class Down(nn.Module):
    """Halve height and width. [B, C, H, W] -> [B, C', H/2, W/2]."""

    def __init__(self, before: int, after: int, *, norm: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after, 4, 2, 1, bias=False)
        self.norm = BatchStatistics(after) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Activate, convolve, normalise."""
        normalised: Tensor = self.norm(self.convolution(F.leaky_relu(x, 0.2)))
        return normalised


class Up(nn.Module):
    """Double height and width. [B, C, H, W] -> [B, C', 2H, 2W]. Dropout stays on in evaluation: it is the noise."""

    def __init__(self, before: int, after: int, *, dropout: bool = False) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)
        self.norm = BatchStatistics(after)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Activate, convolve, normalise, and drop half of the values."""
        normalised: Tensor = self.norm(self.convolution(F.relu(x)))
        return F.dropout(normalised, 0.5, training=True) if self.dropout else normalised


class UNet(nn.Module):
    """Translate images, [B, 3, H, W] in [-1, 1] to the same; the height and width that it was made for.

    ``log2(size)`` halvings down to one pixel and as many doublings, with a connection from each to its counterpart:
    54.4 M parameters for 256 pixels and a width of 64.

    Args:
        size: height and width of the images, a power of two, of at least 32 for the discriminator.
        width: channels of the outermost layer; there are 2, 4 and then 8 times as many further in.

    Raises:
        ValueError: the size is no power of two, or too small.
    """

    def __init__(self, size: int = 256, width: int = 64) -> None:
        super().__init__()
        depth = size.bit_length() - 1
        if size != 2**depth or depth < 5:
            raise ValueError(
                f"The U-Net halves images down to one pixel, so their size must be 32, 64, 128, ..., but is {size}."
                " Give another --image-size."
            )
        channels = [width * min(2**level, 8) for level in range(depth)]
        self.first = nn.Conv2d(3, channels[0], 4, 2, 1, bias=False)
        self.downs = nn.ModuleList(
            # The innermost has one pixel, of which there are no statistics.
            Down(channels[level - 1], channels[level], norm=level < depth - 1)
            for level in range(1, depth)
        )
        self.innermost = Up(channels[-1], channels[-2])
        self.ups = nn.ModuleList(
            # Those but the innermost and with all channels have dropout.
            Up(2 * channels[level], channels[level - 1], dropout=channels[level - 1] == 8 * width)
            for level in reversed(range(1, depth - 1))
        )
        self.last = nn.ConvTranspose2d(2 * channels[0], 3, 4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Translate."""
        skips = [self.first(images)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        x = self.innermost(skips.pop())
        for up in self.ups:
            x = up(torch.cat([skips.pop(), x], 1))
        return torch.tanh(self.last(F.relu(torch.cat([skips.pop(), x], 1))))
