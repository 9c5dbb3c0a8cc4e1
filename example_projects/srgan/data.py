"""Crops of photographs to train on, whole ones to test on, each with its reduction to a quarter of the size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from example_projects.common.augmentation import Draw, generator_of, random_crop
from example_projects.common.image_data import ImageData, Kept, held_back
from example_projects.common.images import from_bytes, list_images, to_bytes
from example_projects.srgan.networks import SCALE
from example_projects.srgan.photographs import BENCHMARK, low_of, read_cut, read_low, read_to_crop
from example_projects.srgan.procedural import dead_leaves

Pair = tuple[Tensor, Tensor]  # low [3, h, w] and high [3, 4h, 4w], in [-1, 1]

PROCEDURAL_TRAIN, PROCEDURAL_TEST = 16, 4  # images
PROCEDURAL_SIZE = 160


def reduced(high: Tensor) -> Tensor:
    """A quarter of the height and of the width, bicubic with antialiasing. uint8 [3, 4h, 4w] -> [3, h, w]."""
    image = Image.fromarray(high.permute(1, 2, 0).numpy())
    return to_bytes(image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.BICUBIC))


def random_position(square: Tensor, generator: torch.Generator) -> Tensor:
    """One of the eight positions of a square: turned by 0 to 270 degrees, mirrored or not. [C, S, S]."""
    position = int(torch.randint(8, (), generator=generator))
    turned = square.rot90(position % 4, (1, 2))
    return turned.flip(2) if position >= 4 else turned


def as_pair(low: Tensor, high: Tensor) -> Pair:
    """From 0..255 to [-1, 1]."""
    return from_bytes(low), from_bytes(high)


class Crops(Dataset[Pair]):
    """Random crops to train on, in random positions.

    Args:
        images: to crop.
        size: of the crops.
        per_image: crops of each image in an epoch.
    """

    def __init__(self, images: Kept, size: int, per_image: int) -> None:
        self.images, self.size, self.per_image = images, size, per_image

    def __len__(self) -> int:
        return len(self.images) * self.per_image

    def __getitem__(self, draw: Draw) -> Pair:
        index, seed = draw
        generator = generator_of(seed)
        crop = random_crop(self.images[index % len(self.images)], self.size, generator)
        high = random_position(crop, generator).contiguous()
        return as_pair(reduced(high), high)


class Whole(Dataset[Pair]):
    """Whole images to test on.

    Args:
        highs: the large images.
        lows: the small ones; made of the large ones if left out.
    """

    def __init__(self, highs: Kept, lows: Kept | None = None) -> None:
        self.highs = highs
        self.lows = Kept(self._reduce, len(highs)) if lows is None else lows

    def __len__(self) -> int:
        return len(self.highs)

    def __getitem__(self, index: int) -> Pair:
        return as_pair(self.lows[index], self.highs[index])

    def _reduce(self, index: int) -> Tensor:
        return reduced(self.highs[index])


def read_whole(folder: Path) -> Whole:
    """The pairs ``*_HR.png`` and ``*_LR.png`` of a benchmark; or any images, which are then reduced here.

    Raises:
        FileNotFoundError: one of a pair is missing.
    """
    paths = list_images(folder)
    benchmark = [path for path in paths if BENCHMARK.fullmatch(path.name)]
    for path in benchmark:
        if not low_of(path).is_file():
            raise FileNotFoundError(f"{path} has no {low_of(path).name} beside it. Put it there, or take both away.")
    if not benchmark:
        return Whole(Kept(partial(read_cut, paths), len(paths)))
    return Whole(*(Kept(partial(read, benchmark), len(benchmark)) for read in (read_cut, read_low)))


def generate(first: int, size: int, index: int) -> Tensor:
    """One of the generated images, uint8 [3, size, size]."""
    return to_bytes(dead_leaves(size, first + index))


def check_folders(data_dir: Path | None, test_dirs: Sequence[Path]) -> None:
    """Raise unless all folders are given and there, or none is given.

    Raises:
        ValueError: only one kind is given, or two test sets of the same name.
        FileNotFoundError: one is not there.
    """
    wanted = {
        "--data-dir": ([data_dir] if data_dir else [], "a folder of photographs to train on"),
        "--test-dir": (test_dirs, "a folder of photographs to test on, or of pairs *_HR.png and *_LR.png as in Set14"),
    }
    given = [option for option, (folders, _) in wanted.items() if folders]
    for option, (folders, what) in wanted.items():
        if given and not folders:
            raise ValueError(f"{given[0]} is given without {option}. Give that, too: {what}.")
    for option, (folders, what) in wanted.items():
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"There is no folder {folder}. Give {option} {what}.")
    names = [folder.name for folder in test_dirs]
    if len(set(names)) < len(names):
        raise ValueError(f"The folders of --test-dir must have different names, but are called {', '.join(names)}.")


def make_data(
    data_dir: Path | None,
    test_dirs: Sequence[Path],
    *,
    image_size: int,
    crops_per_image: int,
    batch_size: int,
    seed: int,
    workers: int = 0,
    validation: int = 0,
) -> ImageData:
    """What is trained and tested on.

    Args:
        data_dir: a folder of photographs to crop; generated images if ``None``.
        test_dirs: folders of photographs or of a benchmark's pairs to test on, each a set by its name.
        image_size: of the crops.
        crops_per_image: in an epoch.
        batch_size: of training, of each process.
        seed: of order, crops and positions.
        workers: processes that load crops.
        validation: how many of the photographs are held back to validate on.

    Raises:
        ValueError: only one kind of folder is given, or too few photographs are left to train on.
        FileNotFoundError: a folder is not there, or has no image.
    """
    check_folders(data_dir, test_dirs)
    train, whole, tests, source = _generated(image_size) if data_dir is None else _read(data_dir, test_dirs, image_size)
    to_train_on, to_validate_on = held_back(len(train), validation)
    also = f", {validation} photographs to validate on" if validation else ""
    counts = " and ".join(f"{len(test)}{f' of {name}' if name else ''}" for name, test in tests.items())
    return ImageData(
        Crops(train.part(to_train_on), image_size, crops_per_image),
        tests if len(tests) > 1 else next(iter(tests.values())),
        batch_size=batch_size,
        seed=seed,
        announcement=f"{source}: crops of {len(to_train_on)} to train on{also}, {counts} to test on.",
        workers=workers,
        validation=Whole(whole.part(to_validate_on)) if validation else None,
        files=(train, *(kept for test in tests.values() for kept in (test.highs, test.lows))) if data_dir else (),
    )


Source = tuple[Kept, Kept, dict[str, Whole], str]  # to crop, the same as whole images, test sets by name, where from


def _generated(image_size: int) -> Source:
    size = max(PROCEDURAL_SIZE, image_size)
    images = Kept(partial(generate, 0, size), PROCEDURAL_TRAIN)
    test = Whole(Kept(partial(generate, PROCEDURAL_TRAIN, PROCEDURAL_SIZE), PROCEDURAL_TEST))
    return images, images, {"": test}, f"No --data-dir: images of {size}x{size} pixels are generated"


def _read(data_dir: Path, test_dirs: Sequence[Path], image_size: int) -> Source:
    paths = list_images(data_dir)
    to_crop = Kept(partial(read_to_crop, paths, image_size), len(paths))
    tests = {folder.name if len(test_dirs) > 1 else "": read_whole(folder) for folder in test_dirs}
    folders = " and ".join(str(folder) for folder in (data_dir, *test_dirs))
    return to_crop, Kept(partial(read_cut, paths), len(paths)), tests, f"Photographs from {folders}"
