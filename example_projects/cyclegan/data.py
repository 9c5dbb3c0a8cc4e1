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
from example_projects.common.image_data import ImageData, Kept, held_back
from example_projects.common.images import from_bytes, list_images, read_image, to_bytes
from example_projects.cyclegan.textures import scene
from example_projects.pix2pix.data import JITTER, find_hold_out, halves, read_pair

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
    folder: Path | None,
    *,
    size: int,
    direction: str,
    batch_size: int,
    seed: int,
    workers: int = 0,
    validation: int = 0,
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
        validation: how many of the training images of each domain are held back to validate on.
    """
    domains = ("A", "B") if direction == "AtoB" else ("B", "A")
    images, origin = _source(folder)
    train = [images("train", domain, round(size * JITTER)) for domain in domains]
    splits = [held_back(len(kept), validation) for kept in train]
    tests = [images("test", domain, size) for domain in domains]
    backs = [images("validation", domain, size).part(back) for domain, (_, back) in zip(domains, splits, strict=True)]
    counts = " and ".join(f"{len(rest)} {domain}" for (rest, _), domain in zip(splits, domains, strict=True))
    also = f", {validation} of each to validate on" if validation else ""
    truth = "with" if has_truth(folder) else "without"
    test = SideBySide(*tests)
    return ImageData(
        Unpaired(*(kept.part(rest) for kept, (rest, _) in zip(train, splits, strict=True)), size),
        test,
        batch_size=batch_size,
        seed=seed,
        announcement=f"{origin}: {counts} to train on{also}, {len(test)} of each held out, {truth} a truth,"
        f" {direction}.",
        workers=workers,
        validation=SideBySide(*backs) if validation else None,
        files=(*train, *tests) if folder else (),
    )


def _source(folder: Path | None) -> tuple[Callable[[str, str, int], Kept], str]:
    """What gives the images of a split and a domain in a size, uint8 [3, size, size], and where they are from.

    The split "validation" has the images of "train", of which some are held back.
    """
    if folder is None:
        return textures, "Procedural textures, orange squares (A) and blue discs (B), since there is no --data-dir"
    if has_truth(folder):
        return partial(halves_of_pairs, folder), f"Pairs from {folder}, taken apart"
    return partial(images_of_domain, folder), f"Images from {folder}"


def images_of_domain(folder: Path, split: str, domain: str, size: int) -> Kept:
    """The images of ``train<domain>`` or ``test<domain>``, by name."""
    files = list_images(folder / f"{'test' if split == 'test' else 'train'}{domain}")
    return Kept(partial(resized, files, size), len(files))


def halves_of_pairs(folder: Path, split: str, domain: str, size: int) -> Kept:
    """The left (A) or right (B) halves of the images of a split, by name."""
    files = list_images(find_hold_out(folder) if split == "test" else folder / "train")
    direction = "AtoB" if domain == "A" else "BtoA"
    return Kept(partial(half, files, size, direction), len(files))


def textures(split: str, domain: str, size: int) -> Kept:
    """Procedural scenes: in training the domains share none, in testing and in validation all."""
    first, count = {
        "train": (TRAINING_SCENES * "AB".index(domain), TRAINING_SCENES),
        "test": (2 * TRAINING_SCENES, TEST_SCENES),
        "validation": (2 * TRAINING_SCENES + TEST_SCENES, TRAINING_SCENES),
    }[split]
    return Kept(partial(numbered_scene, domain, first, size), count)


def resized(files: Sequence[Path], size: int, index: int) -> Tensor:
    """One of the files, uint8 [3, size, size]."""
    return to_bytes(read_image(files[index]).resize((size, size), Image.Resampling.BICUBIC))


def half(files: Sequence[Path], size: int, direction: str, index: int) -> Tensor:
    """The source of one of the pairs, uint8 [3, size, size]."""
    return halves(read_pair(files, index), size, direction)[:3].clone()


def numbered_scene(domain: str, first: int, size: int, index: int) -> Tensor:
    """A scene by its place after the first, uint8 [3, size, size]."""
    return scene(domain, first + index, size)
