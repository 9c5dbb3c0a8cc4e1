"""Photographs from files: to crop, to test on, and a benchmark's pairs. What cannot be used is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from example_projects.common.images import read_image, to_bytes
from example_projects.srgan.networks import SCALE

BENCHMARK = re.compile(r"(.*)_HR(\.\w+)")  # Set5, Set14, BSD100: img_001_SRF_4_HR.png beside img_001_SRF_4_LR.png
# Pixels: SSIM reflects 5 beyond the edges of the luma, from which 4 at each edge are left out; a multiple of four.
LEAST = 16


def read_to_crop(paths: Sequence[Path], size: int, index: int) -> Tensor:
    """Read one of the photographs, uint8 [3, H, W].

    Raises:
        ValueError: it is smaller than the crops.
    """
    return _read_if_large(paths[index], size, f"for crops of {size}x{size}", "give a smaller --image-size")


def read_cut(paths: Sequence[Path], index: int) -> Tensor:
    """Read one of the images, cut at the right and at the bottom to a multiple of four. uint8 [3, H, W].

    Raises:
        ValueError: what is left is too small to be measured.
    """
    purpose = f"to be measured: {LEAST}x{LEAST} is the least"
    high = _read_if_large(paths[index], LEAST, purpose, "put a larger one there")
    return high[:, : high.shape[1] // SCALE * SCALE, : high.shape[2] // SCALE * SCALE].contiguous()


def _read_if_large(path: Path, least: int, purpose: str, or_else: str) -> Tensor:
    image = read_image(path)
    if min(image.size) < least:
        raise ValueError(
            f"{path} is {image.width}x{image.height}, too small {purpose}. Take it out of the folder, or {or_else}."
        )
    return to_bytes(image)


def low_of(high: Path) -> Path:
    """The file beside a benchmark's file with the large image."""
    return high.with_name(BENCHMARK.sub(r"\1_LR\2", high.name))


def read_low(highs: Sequence[Path], index: int) -> Tensor:
    """Read the small image of one of a benchmark's pairs, uint8 [3, h, w].

    Raises:
        ValueError: the large one is not four times as large.
    """
    high = highs[index]
    low, size = read_image(low_of(high)), read_image(high).size
    if size != (SCALE * low.width, SCALE * low.height):
        raise ValueError(
            f"{high} is {size[0]}x{size[1]}, which is not {SCALE} times the {low.width}x{low.height} of"
            f" {low_of(high).name}. Put the pair for a factor of {SCALE} there."
        )
    return to_bytes(low)
