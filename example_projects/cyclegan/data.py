"""Two domains: the folders trainA, trainB, testA and testB, or pairs that are taken apart, or procedural textures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from example_projects.common.augmentation import Draw, generator_of, random_crop, random_flip
from example_projects.common.image_data import ImageData, Kept
from example_projects.common.images import from_bytes, list_images, read_image, to_bytes
from example_projects.cyclegan.textures import scene
from example_projects.pix2pix.data import JITTER, find_hold_out, halves

Pair = tuple[Tensor, Tensor]  # an image of A and one of B, float [3, S, S] in [-1, 1]
TRAINING_SCENES, TEST_SCENES = 200, 20  # of each domain of the procedural data set


class Unpaired(Dataset[Pair]):
    """Every image of the larger domain once, each A beside a random B, cropped at random and mirrored by chance.

    Args:
        a: images of domain A, uint8 [3, H, W].
        b: images of domain B.
        image_size: of the crops.
    """

    def __init__(self, a: Kept, b: Kept, image_size: int) -> None:
        self.a, self.b, self.image_size = a, b, image_size

    def __len__(self) -> int:
        return max(len(self.a), len(self.b))

    def __getitem__(self, draw: Draw) -> Pair:
        index, seed = draw
        generator = generator_of(seed)
        company = int(torch.randint(len(self.b), (), generator=generator))
        return (
            self._augment(self.a[index % len(self.a)], generator),
            self._augment(self.b[company], generator),
        )

    def _augment(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return from_bytes(random_flip(random_crop(image, self.image_size, generator), generator))


class SideBySide(Dataset[Pair]):
    """The images of both domains in their order, as many as the smaller has.

    Args:
        a: images of domain A, uint8 [3, S, S].
        b: images of domain B.
    """

    def __init__(self, a: Kept, b: Kept) -> None:
        self.a, self.b = a, b

    def __len__(self) -> int:
        return min(len(self.a), len(self.b))

    def __getitem__(self, index: int) -> Pair:
        return from_bytes(self.a[index]), from_bytes(self.b[index])


def has_truth(folder: Path | None) -> bool:
    """Whether both domains show the same scenes in testing, so that there is a truth for every translation."""
    return folder is None or (folder / "train").is_dir()


def make_data(
    folder: Path | None, *, size: int, direction: str, batch_size: int, seed: int, workers: int = 0
) -> ImageData:
    """The images in ``folder``, or procedural textures without a folder, in batches of (A, B).

    Args:
        folder: with trainA, trainB, testA and testB; or as for pix2pix with ``train`` and ``test`` (or ``val``), of
            images that are two side by side: those of training are taken apart, so that they are unpaired.
        size: height and width to train on.
        direction: "AtoB", or "BtoA" to exchange the domains.
        batch_size: of training, of each process.
        seed: of the order, of the augmentation and of who meets whom.
        workers: processes that load.
    """
    domains = ("A", "B") if direction == "AtoB" else ("B", "A")
    images, origin = _source(folder)
    train = [images("train", domain, round(size * JITTER)) for domain in domains]
    test = SideBySide(*(images("test", domain, size) for domain in domains))
    counts = " and ".join(f"{len(kept)} {domain}" for kept, domain in zip(train, domains, strict=True))
    truth = "with" if has_truth(folder) else "without"
    return ImageData(
        Unpaired(*train, size),
        test,
        batch_size=batch_size,
        seed=seed,
        announcement=f"{origin}: {counts} to train on, {len(test)} of each held out, {truth} a truth, {direction}.",
        workers=workers,
    )


def _source(folder: Path | None) -> tuple[Callable[[str, str, int], Kept], str]:
    """What gives the images of a split and a domain in a size, uint8 [3, size, size], and where they are from."""
    if folder is None:
        return textures, "Procedural textures, orange squares (A) and blue discs (B), since there is no --data-dir"
    if has_truth(folder):
        return partial(halves_of_pairs, folder), f"Pairs from {folder}, taken apart"
    return partial(images_of_domain, folder), f"Images from {folder}"


def images_of_domain(folder: Path, split: str, domain: str, size: int) -> Kept:
    """The images of ``<split><domain>``, by name."""
    files = list_images(folder / f"{split}{domain}")
    return Kept(partial(resized, files, size), len(files))


def halves_of_pairs(folder: Path, split: str, domain: str, size: int) -> Kept:
    """The left (A) or right (B) halves of the images of a split, by name."""
    files = list_images(folder / "train" if split == "train" else find_hold_out(folder))
    direction = "AtoB" if domain == "A" else "BtoA"
    return Kept(partial(half, files, size, direction), len(files))


def textures(split: str, domain: str, size: int) -> Kept:
    """Procedural scenes: in training the domains share none, in testing all."""
    if split == "test":
        first, count = 2 * TRAINING_SCENES, TEST_SCENES
    else:
        first, count = TRAINING_SCENES * "AB".index(domain), TRAINING_SCENES
    return Kept(partial(numbered_scene, domain, first, size), count)


def resized(files: Sequence[Path], size: int, index: int) -> Tensor:
    """One of the files, uint8 [3, size, size]."""
    return to_bytes(read_image(files[index]).resize((size, size), Image.Resampling.BICUBIC))


def half(files: Sequence[Path], size: int, direction: str, index: int) -> Tensor:
    """The source of one of the pairs, uint8 [3, size, size]."""
    return halves(read_image(files[index]), size, direction)[:3].clone()


def numbered_scene(domain: str, first: int, size: int, index: int) -> Tensor:
    """A scene by its place after the first, uint8 [3, size, size]."""
    return scene(domain, first + index, size)
