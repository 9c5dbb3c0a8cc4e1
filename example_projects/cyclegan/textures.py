"""A procedural stand-in for two unpaired domains: the same kind of object in two textures, of which the truth is known.

Both textures follow one field over the image, and neither cropping nor mirroring breaks the relation between them, so
each scene of domain A has exactly one counterpart in domain B.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PERIOD = 1 / 6  # of the texture, in widths of the image
OBJECTS = 3
COLOURS = {  # ground and figure of the texture, RGB in [0, 1]
    "A": ((0.45, 0.25, 0.12), (0.95, 0.62, 0.18)),
    "B": ((0.93, 0.93, 0.90), (0.12, 0.22, 0.55)),
}


def scene(domain: str, number: int, size: int) -> Tensor:
    """Draw a scene: domain A has brown objects with orange squares, domain B the same objects, white with blue discs.

    Args:
        domain: "A" or "B".
        number: of the scene; the same number gives the same objects in both domains.
        size: S.

    Returns:
        [3, S, S], uint8.

    Example:
        >>> scene("A", 0, 32).shape
        torch.Size([3, 32, 32])
    """
    generator = torch.Generator().manual_seed(number)
    random = torch.rand(5 * OBJECTS + 5, generator=generator)
    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    mask = torch.stack([_ellipse(x, y, part) for part in random[: 5 * OBJECTS].view(OBJECTS, 5)]).amax(0)
    ground, phase = random[-5:-2], random[-2:]
    meadow = (0.25 + 0.3 * ground[:, None, None]) * (0.7 + 0.5 * y)
    light = 0.75 + 0.25 * (1 - y)
    image = torch.where(mask > 0, _texture(domain, x, y, phase) * light, meadow)
    return (255 * image.clamp(0, 1)).round().to(torch.uint8)


def _ellipse(x: Tensor, y: Tensor, part: Tensor) -> Tensor:
    """1 within an ellipse, 0 outside. [S, S]; its centre, radii and angle come from five numbers in [0, 1]."""
    centre, radii, angle = 0.25 + 0.5 * part[:2], 0.1 + 0.2 * part[2:4], math.pi * part[4]
    across = (x - centre[0]) * angle.cos() + (y - centre[1]) * angle.sin()
    along = (y - centre[1]) * angle.cos() - (x - centre[0]) * angle.sin()
    return ((across / radii[0]).square() + (along / radii[1]).square() < 1).float()


def _texture(domain: str, x: Tensor, y: Tensor, phase: Tensor) -> Tensor:
    """Squares (A) or discs (B) around the same centres. [3, S, S]."""
    offsets = torch.stack([x, y]) / PERIOD + phase[:, None, None]
    distances = (offsets % 1 - 0.5).abs()  # from the nearest centre, across and down
    inside = distances.amax(0) < 0.3 if domain == "A" else distances.square().sum(0).sqrt() < 0.35
    ground, figure = (torch.tensor(colour)[:, None, None] for colour in COLOURS[domain])
    return torch.where(inside, figure, ground)
