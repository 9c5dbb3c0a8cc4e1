"""Two domains without pairs: the folders trainA, trainB, testA and testB, or procedural textures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from example_projects.common.augmentation import Draw, generator_of, random_crop, random_flip
from example_projects.common.image_data import ImageData, Kept
from example_projects.common.images import from_bytes, list_images, read_image, to_bytes
from example_projects.cyclegan.textures import scene

Pair = tuple[Tensor, Tensor]  # an image of A and one of B, float [3, S, S] in [-1, 1]
TRAINING_SCENES, TEST_SCENES = 200, 20  # of each domain of the procedural data set


def load_size(image_size: int) -> int:
    """To what size a training image is resized before a crop of ``image_size`` is taken out of it.

    Example:
        >>> load_size(256)
        286
    """
    return round(image_size * 286 / 256)


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


class UnpairedImages(ImageData):
    """Two domains in batches of (A, B), each [B, 3, S, S].

    Args:
        folder: with trainA, trainB, testA and testB; ``None`` for the procedural textures.
        image_size: S.
        batch_size: of training, of each process.
        seed: of the order, of the augmentation and of who meets whom.
        direction: "AtoB", or "BtoA" to exchange the domains.
        workers: processes that load training samples.

    Attributes:
        paired: whether both domains show the same scenes in testing, so that a translation has a truth.
    """

    def __init__(
        self,
        folder: Path | None,
        image_size: int,
        *,
        batch_size: int,
        seed: int,
        direction: str = "AtoB",
        workers: int = 0,
    ) -> None:
        domains = ("A", "B") if direction == "AtoB" else ("B", "A")
        larger = load_size(image_size)
        if folder is None:
            train = [drawn_images("train", domain, larger) for domain in domains]
            test = [drawn_images("test", domain, image_size) for domain in domains]
            source = "Without --data-dir: procedural textures, orange squares (A) and blue discs (B), not photographs"
        else:
            train = [folder_images(folder / f"train{domain}", larger) for domain in domains]
            test = [folder_images(folder / f"test{domain}", image_size) for domain in domains]
            source = f"Images from {folder}"
        counts = ", ".join(f"{len(images)} {domain}" for images, domain in zip(train, domains, strict=True))
        held_out = SideBySide(*test)
        super().__init__(
            Unpaired(*train, image_size),
            held_out,
            batch_size=batch_size,
            seed=seed,
            announcement=f"{source}: {counts} for training, {len(held_out)} of each for testing.",
            workers=workers,
        )
        self.paired = folder is None


def folder_images(folder: Path, size: int) -> Kept:
    """The images of a folder, by name, resized to [3, size, size]."""
    paths = list_images(folder)

    def read(index: int) -> Tensor:
        return to_bytes(read_image(paths[index]).resize((size, size), Image.Resampling.BICUBIC))

    return Kept(read, len(paths))


def drawn_images(split: str, domain: str, size: int) -> Kept:
    """Procedural images, [3, size, size]: in training the domains share no scene, in testing all."""
    if split == "test":
        first, count = 2 * TRAINING_SCENES, TEST_SCENES
    else:
        first, count = TRAINING_SCENES * "AB".index(domain), TRAINING_SCENES
    return Kept(lambda index: scene(domain, first + index, size), count)
