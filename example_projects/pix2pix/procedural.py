"""Facades that are drawn by chance, with the label maps that they are drawn from, for when there are no photos."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from PIL import Image

SIZE = 256
Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, bottom, left, right

# The colours of the parts in the label maps, as in CMP facades.
LABELS = {
    "sky": (0, 0, 170),
    "wall": (0, 0, 255),
    "window": (0, 85, 255),
    "sill": (0, 255, 255),
    "cornice": (255, 85, 0),
    "balcony": (85, 255, 170),
    "door": (0, 170, 255),
}


# The darkest and the brightest grey of each part, and by how much a colour may differ from it.
SHADES = {
    "sky": (150, 235),
    "wall": (110, 210),
    "window": (25, 80),
    "sill": (150, 230),
    "cornice": (120, 220),
    "balcony": (40, 110),
    "door": (50, 120),
}
TINT = 30


@dataclass(frozen=True)
class Part:
    """A rectangle of a facade."""

    label: str
    box: Box


def draw_facade(index: int) -> Image.Image:
    """A generated facade and its label map side by side, 512x256: the "photo" on the left, the labels on the right.

    Args:
        index: of the facade; the same gives the same.
    """
    random = default_rng(index)
    parts = plan(random)
    photo = np.zeros((SIZE, SIZE, 3), np.uint8)
    labels = np.zeros((SIZE, SIZE, 3), np.uint8)
    colours = {
        label: random.integers(low, high) + random.integers(-TINT, TINT, 3) for label, (low, high) in SHADES.items()
    }
    for part in parts:
        top, bottom, left, right = part.box
        labels[top:bottom, left:right] = LABELS[part.label]
        photo[top:bottom, left:right] = texture(part, colours[part.label], random)
    return Image.fromarray(np.concatenate([photo, labels], 1))


def plan(random: Generator) -> list[Part]:
    """The parts of a facade, those in front last."""
    roof, ground = int(random.integers(8, 40)), int(random.integers(200, 216))
    floors, columns = int(random.integers(2, 6)), int(random.integers(3, 7))
    parts = [Part("sky", (0, SIZE, 0, SIZE)), Part("wall", (roof, SIZE, 0, SIZE))]
    parts += [Part("cornice", (roof, roof + 8, 0, SIZE)), Part("cornice", (ground - 6, ground, 0, SIZE))]
    height, width = (ground - roof - 14) // floors, SIZE // columns
    inner_height, inner_width = int(height * random.uniform(0.5, 0.7)), int(width * random.uniform(0.4, 0.7))
    balconies = set(random.choice(floors, int(random.integers(0, 2)), replace=False).tolist())
    for floor in range(floors):
        top = roof + 8 + floor * height + (height - inner_height) // 2
        for column in range(columns):
            left = column * width + (width - inner_width) // 2
            right, bottom = left + inner_width, top + inner_height
            parts += [
                Part("sill", (bottom, bottom + 4, left - 2, right + 2)),
                Part("window", (top, bottom, left, right)),
            ]
            if floor in balconies:
                parts.append(Part("balcony", (bottom - inner_height // 3, bottom + 4, left - 5, right + 5)))
    door = int(random.integers(columns))
    for column in range(columns):
        left = column * width + (width - inner_width) // 2
        box = (ground + 8, SIZE if column == door else SIZE - 14, left, left + inner_width)
        parts.append(Part("door" if column == door else "window", box))
    return parts


def texture(part: Part, colour: NDArray[np.integer], random: Generator) -> Pixels:
    """What a part looks like: bricks, panes, bars, and some noise."""
    top, bottom, left, right = part.box
    y, x = np.mgrid[top:bottom, left:right]
    shade = np.zeros(y.shape)
    if part.label == "wall":  # courses of bricks, every other shifted by half a brick
        joint = (y % 8 == 0) | ((x + (y // 8 % 2) * 8) % 16 == 0)
        shade = np.where(joint, -28.0, 0.0)
    elif part.label == "window":  # a frame, a cross and a reflection that falls to the right
        across, down = (x - left) / (right - left), (y - top) / (bottom - top)
        frame = (np.abs(across - 0.5) > 0.44) | (np.abs(across - 0.5) < 0.04) | (np.abs(down - 0.4) < 0.04)
        shade = np.where(frame, 110.0, 70.0 * np.clip(1 - across - down, 0, 1))
    elif part.label == "balcony":
        shade = np.where(x % 5 < 2, 60.0, 0.0)
    elif part.label == "door":
        shade = np.where((x - left) % max(1, (right - left) // 2) < 2, -30.0, 0.0)
    elif part.label == "sky":
        shade = 25.0 * (1 - y / SIZE)
    elif part.label in ("cornice", "sill"):
        shade = np.where(y == bottom - 1, -60.0, 0.0)
    noise = random.normal(0, 6, y.shape)
    return np.clip(colour + (shade + noise)[..., None], 0, 255).astype(np.uint8)
