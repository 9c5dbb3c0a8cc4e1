"""Image files: read, listed, turned into tensors in [-1, 1] and back, and put side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
GAP, PAPER = 4, 255  # between the images of a grid, in pixels; its colour
CELL = 256  # pixels of an image in a grid, at most


def list_images(folder: Path) -> list[Path]:
    """The image files in a folder, by name.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}. Give --data-dir the folder that holds {folder.name!r}, or leave it out to"
            " train on generated images."
        )
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"There is no image in {folder}: no file there ends in one of {', '.join(sorted(SUFFIXES))}. Put the images"
            " of this split there, or leave --data-dir out to train on generated images."
        )
    return found


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB, grey images too.

    Raises:
        ValueError: the file is not a whole image.
        FileNotFoundError: it is not there, or where a link leads.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        gone = f"leads to {path.readlink()}, which is not there" if path.is_symlink() else "is not there"
        raise FileNotFoundError(f"{path} {gone}. Put the image there, or take its name out of the folder.") from error
    except PermissionError as error:
        raise PermissionError(f"{path} may not be read. Allow it, or take it out of the folder.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is not a whole image ({error}). Get it again, or take it out of the folder."
        ) from error


def to_bytes(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def from_bytes(pixels: Tensor) -> Tensor:
    """0..255 to [-1, 1], of any shape."""
    return pixels.float().div_(127.5).sub_(1)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as float [3, H, W] in [-1, 1].

    Example:
        >>> to_tensor(Image.new("RGB", (2, 1), (0, 255, 0)))[:, 0, 0].tolist()
        [-1.0, 1.0, -1.0]
    """
    return from_bytes(to_bytes(image))


def to_image(tensor: Tensor) -> Image.Image:
    """Float [3, H, W] in [-1, 1], clamped and rounded, as an RGB image."""
    pixels = tensor.detach().float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def grid(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Put rows of images side by side, the middle of each, of at most ``CELL`` pixels, all of a row in one size.

    Args:
        rows: of float [3, H, W] in [-1, 1]; a row may be shorter than others.

    Returns:
        uint8 [3, height, width].
    """
    images = [[middle(image) for image in alike([to_image(tensor) for tensor in row])] for row in rows]
    return to_bytes(tiled(images))


def tiled(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of images as one; a row may be shorter than others."""
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), (PAPER,) * 3)
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            sheet.paste(image, (left * (width + GAP), top * (height + GAP)))
    return sheet


def alike(row: Sequence[Image.Image], widest: int = 0) -> list[Image.Image]:
    """Enlarge images by whole factors to the size of the largest, and all as far as they fit: pixels stay visible.

    Args:
        row: of images.
        widest: pixels that there is room for; if 0, the largest keeps its size.

    Example:
        >>> [image.size for image in alike([Image.new("RGB", (8, 4)), Image.new("RGB", (2, 1))], widest=20)]
        [(16, 8), (16, 8)]
    """
    width, height = (max(image.size[side] for image in row) for side in (0, 1))
    enlarged = max(1, widest // max(width, height))
    factors = [max(1, min(enlarged * width // image.width, enlarged * height // image.height)) for image in row]
    return [
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        for image, factor in zip(row, factors, strict=True)
    ]


def middle(image: Image.Image) -> Image.Image:
    """What a grid has room for."""
    width, height = (min(extent, CELL) for extent in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def save_grid(rows: Sequence[Sequence[Tensor]], path: Path) -> None:
    """Write rows of images (see :func:`grid`) as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(rows).permute(1, 2, 0).numpy()).save(path)
