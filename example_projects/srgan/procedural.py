"""Images with the statistics of photographs, made by a formula: leaves of all sizes that cover each other.

In this "dead leaves" model (Lee, Mumford and Huang, IJCV 2001) an object's size has a density of size^-3, which gives
edges and a power spectrum as those of photographs. Here each leaf is an ellipse with a shade and a fine texture.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def dead_leaves(size: int, seed: int, leaves: int = 600) -> Image.Image:
    """One image of ``size`` x ``size`` pixels, the same for the same seed."""
    random = np.random.default_rng(seed)
    image = np.full((size, size, 3), random.uniform(0.2, 0.8, 3))
    for _ in range(leaves):
        # By inversion: radii from 0.02 to 0.5 of the image with density radius^-3.
        radius = size * random.uniform(0.5**-2, 0.02**-2) ** -0.5
        centre = random.uniform(0, size, 2)
        top, left = np.maximum(centre - radius, 0).astype(int)
        bottom, right = np.ceil(centre + radius).astype(int)
        covered = image[top:bottom, left:right]
        y, x = np.mgrid[: covered.shape[0], : covered.shape[1]] + (np.array([top, left]) - centre)[:, None, None]
        angle, squeeze = random.uniform(0, np.pi), random.uniform(0.4, 1)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        shade = 0.25 * (along + across) / radius
        texture = 0.1 * random.uniform() * np.sin(2 * np.pi * across / random.uniform(3, 40))
        inside = (along / radius) ** 2 + (across / (radius * squeeze)) ** 2 < 1
        colour = random.uniform(0.1, 0.9) + random.normal(0, 0.1, 3) + (shade + texture)[..., None]
        covered[inside] = colour[inside]
    return Image.fromarray((255 * image.clip(0, 1)).round().astype(np.uint8))
