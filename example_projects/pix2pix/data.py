"""Pairs of images: the halves of one file each, or generated facades and their label maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from example_projects.common.augmentation import Draw, generator_of, random_crop, random_flip
from example_projects.common.image_data import ImageData, Kept, held_back
from example_projects.common.images import from_bytes, list_images, read_image, to_bytes
from example_projects.pix2pix.procedural import draw_facade

JITTER = 286 / 256  # the original resizes to 286 pixels and crops 256
HOLD_OUT = ("test", "val")  # the names that the hold-out set has in facades and in maps
TRAIN_FACADES, TEST_FACADES = 100, 20  # generated

Draws = Callable[[int], Image.Image]  # an image for an index
Pair = tuple[Tensor, Tensor]  # source and target, float [3, H, W] in [-1, 1] each


def find_hold_out(folder: Path) -> Path:
    """The folder of the hold-out set: "test" or, as in maps, "val".

    Raises:
        FileNotFoundError: there is neither.
    """
    for name in HOLD_OUT:
        if (folder / name).is_dir():
            return folder / name
    raise FileNotFoundError(
        f"There is neither {folder / HOLD_OUT[0]} nor {folder / HOLD_OUT[1]}. Give --data-dir a folder with train/ and"
        " test/, of images that are two side by side, or leave it out to train on generated images."
    )


def halves(image: Image.Image, size: int, direction: str) -> Tensor:
    """Cut an image in its two halves, A on the left and B on the right, and resize both.

    Args:
        image: of any size.
        size: height and width of the halves afterwards.
        direction: "AtoB" or "BtoA": which is the source.

    Returns:
        uint8 [6, size, size], the source before the target.
    """
    half = image.width // 2
    sides = [image.crop((start, 0, start + half, image.height)) for start in (0, half)]
    resized = [to_bytes(side.resize((size, size), Image.Resampling.BICUBIC)) for side in sides]
    return torch.cat(resized if direction == "AtoB" else resized[::-1])


def split(pair: Tensor) -> Pair:
    """A pair of bytes, [6, H, W], as source and target in [-1, 1]."""
    source, target = from_bytes(pair).chunk(2)
    return source, target


class TrainPairs(Dataset[Pair]):
    """Pairs that are cropped out of larger ones and mirrored at random, source and target alike.

    Args:
        pairs: uint8 [6, H, W].
        size: height and width of the crop.
    """

    def __init__(self, pairs: Kept, size: int) -> None:
        self.pairs, self.size = pairs, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, draw: Draw) -> Pair:
        index, seed = draw
        generator = generator_of(seed)
        return split(random_flip(random_crop(self.pairs[index], self.size, generator), generator))


class TestPairs(Dataset[Pair]):
    """Pairs as they are.

    Args:
        pairs: uint8 [6, H, W].
    """

    def __init__(self, pairs: Kept) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return split(self.pairs[index])


def draw_held_out(index: int) -> Image.Image:
    """A generated facade that is not among those trained on."""
    return draw_facade(TRAIN_FACADES + index)


def read_pair(files: Sequence[Path], index: int) -> Image.Image:
    """Read one of the files.

    Raises:
        ValueError: it is no image, or not wide enough to be two side by side.
    """
    image = read_image(files[index])
    if image.width < 2 * image.height - 1:
        raise ValueError(
            f"{files[index]} is {image.width}x{image.height}, so it is not a pair: two images side by side are at least"
            " twice as wide as high, for example 512x256. Put source and target beside each other in one file, both"
            " resized to squares. Images without partners are for example_projects.cyclegan."
        )
    return image


def make_pair(draw: Callable[[int], Image.Image], size: int, direction: str, index: int) -> Tensor:
    """The pair that ``draw`` gives for an index, uint8 [6, size, size], the source before the target."""
    return halves(draw(index), size, direction)


def make_data(
    folder: Path | None,
    *,
    size: int,
    direction: str,
    batch_size: int,
    seed: int,
    workers: int = 0,
    validation: int = 0,
) -> ImageData:
    """The pairs in ``folder``, or generated ones without a folder.

    Args:
        folder: with ``train`` and ``test`` (or ``val``).
        size: height and width to train on.
        direction: "AtoB" or "BtoA".
        batch_size: of training, of each process.
        seed: of the order and of the augmentation.
        workers: processes that load.
        validation: how many of the training images are held back to validate on.
    """
    draws, counts, origin = _source(folder)
    train, back, test = (
        Kept(partial(make_pair, draw, extent, direction), count)
        for draw, count, extent in zip(
            (draws[0], *draws), (counts[0], *counts), (round(size * JITTER), size, size), strict=True
        )
    )
    to_train_on, to_validate_on = held_back(len(train), validation)
    also = f", {validation} to validate on" if validation else ""
    return ImageData(
        TrainPairs(train.part(to_train_on), size),
        TestPairs(test),
        batch_size=batch_size,
        seed=seed,
        announcement=f"{origin}: {len(to_train_on)} to train on{also}, {len(test)} held out, {direction}.",
        workers=workers,
        validation=TestPairs(back.part(to_validate_on)) if validation else None,
        files=(train, test) if folder else (),
    )


def _source(folder: Path | None) -> tuple[tuple[Draws, Draws], tuple[int, int], str]:
    """What draws the images to train and to test on, how many there are, and where they are from."""
    if folder is None:
        counts = TRAIN_FACADES, TEST_FACADES
        return (
            (draw_facade, draw_held_out),
            counts,
            "Generated facades and their label maps, since there is no --data-dir",
        )
    files = list_images(folder / "train"), list_images(find_hold_out(folder))
    draws = partial(read_pair, files[0]), partial(read_pair, files[1])
    return draws, (len(files[0]), len(files[1])), f"Pairs from {folder}"
