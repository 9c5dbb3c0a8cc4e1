"""What the data of all image projects have in common: images in memory, batches that resume, an announcement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from example_projects.common.augmentation import DrawSampler
from example_projects.common.exact_resume import EpochSampler

MEMORY = 2**30  # bytes of decoded images that are kept
NAMED = 3  # of the images that cannot be used


class Kept:
    """Images by index, each made once and kept, as long as there is room.

    Args:
        make: takes the index and makes the image, uint8 [C, H, W].
        size: the number of images.
        memory: how many bytes are kept at most, in each process; what is beyond them is made again every time.
    """

    def __init__(self, make: Callable[[int], Tensor], size: int, memory: int = MEMORY) -> None:
        self.make, self.size, self.memory = make, size, memory
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        image = self.make(index)
        if image.nbytes <= self.memory:
            self.memory -= image.nbytes
            self._kept[index] = image
        return image

    def part(self, indices: Sequence[int]) -> Kept:
        """Those of the images, in this order."""
        return Kept(partial(_make_one_of, self.make, tuple(indices)), len(indices), self.memory)

    def faults(self) -> list[str]:
        """What is wrong with each image that cannot be made; all are made, and none is kept."""
        found = []
        for index in range(len(self)):
            try:
                self.make(index)
            except (ValueError, OSError) as error:
                found.append(str(error))
        return found


def _make_one_of(make: Callable[[int], Tensor], indices: Sequence[int], index: int) -> Tensor:
    return make(indices[index])


def held_back(size: int, wanted: int) -> tuple[list[int], list[int]]:
    """Which of the training images to train on, and which to validate on, the latter evenly spread.

    Args:
        size: the number of training images.
        wanted: how many are held back.

    Raises:
        ValueError: none would be left to train on.

    Example:
        >>> held_back(7, 2)
        ([1, 2, 4, 5, 6], [0, 3])
    """
    if wanted >= size:
        raise ValueError(f"--validation {wanted} leaves none of {size} training images to train on. Hold back fewer.")
    back = [place * size // wanted for place in range(wanted)]
    return [index for index in range(size) if index not in set(back)], back


Test = Dataset[Any] | Mapping[str, Dataset[Any]]


class ImageData(pl.LightningDataModule):
    """Training batches in an order that depends on the seed alone, and images to measure one at a time.

    Args:
        train: gives a training sample for an index and the seed of its augmentation.
        test: gives a sample of the hold-out set for an index; or several such sets by name.
        batch_size: of training, of each process.
        seed: of the order and of the augmentation.
        announcement: a sentence that says where the images are from, and how many there are.
        workers: processes that load training samples.
        validation: training images that were held back, measured during training in place of the hold-out set.
        files: the images that are read from files, of which :meth:`check` makes sure.
    """

    def __init__(
        self,
        train: Dataset[Any],
        test: Test,
        *,
        batch_size: int,
        seed: int,
        announcement: str,
        workers: int = 0,
        validation: Dataset[Any] | None = None,
        files: Sequence[Kept] = (),
    ) -> None:
        super().__init__()
        self.train, self.test, self.files = train, test, files
        self.validation = test if validation is None else validation
        self.batch_size, self.seed, self.announcement, self.workers = batch_size, seed, announcement, workers

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches."""
        order = EpochSampler(len(self.train), self.batch_size, self.seed, self.trainer)  # type: ignore[arg-type]
        # A generator of its own, so that making an iterator takes no random numbers from the training.
        return DataLoader(
            self.train,
            self.batch_size,
            sampler=DrawSampler(order),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,  # with the images that they keep
            generator=torch.Generator(),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """What is measured during training: the images that were held back, or else the hold-out set."""
        return self._one_by_one(self.validation)

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The hold-out set, or several."""
        return self._one_by_one(self.test)

    def _one_by_one(self, images: Test) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Of several processes each takes its share, and the metrics count over all."""
        if isinstance(images, Mapping):
            return [self._loader(part) for part in images.values()]
        return self._loader(images)

    def _loader(self, images: Dataset[Any]) -> DataLoader[Any]:
        share = range(self.trainer.global_rank, len(images), self.trainer.world_size)  # type: ignore[arg-type]
        return DataLoader(images, 1, sampler=share)

    def check(self) -> None:
        """Read every file, before time is spent on training.

        Raises:
            ValueError: naming the first files that cannot be used, and how many there are.
        """
        faults = list(dict.fromkeys(fault for kept in self.files for fault in kept.faults()))
        if faults:
            count = f"{len(faults)} images cannot be used. " if len(faults) > 1 else ""
            first = f"The first {NAMED} are these. " if len(faults) > NAMED else ""
            raise ValueError(count + first + " ".join(faults[:NAMED]))
