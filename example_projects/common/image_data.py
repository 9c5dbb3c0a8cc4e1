"""What the data of all image projects have in common: images in memory, batches that resume, an announcement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from example_projects.common.augmentation import DrawSampler
from example_projects.common.exact_resume import EpochSampler

MEMORY = 2**30  # bytes of decoded images that are kept


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


class ImageData(pl.LightningDataModule):
    """Training batches in an order that depends on the seed alone, and the hold-out set one image at a time.

    Args:
        train: gives a training sample for an index and the seed of its augmentation.
        test: gives a sample of the hold-out set for an index.
        batch_size: of training, of each process.
        seed: of the order and of the augmentation.
        announcement: a sentence that says where the images are from, and how many there are.
        workers: processes that load training samples.
    """

    def __init__(
        self,
        train: Dataset[Any],
        test: Dataset[Any],
        *,
        batch_size: int,
        seed: int,
        announcement: str,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.test = train, test
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

    def val_dataloader(self) -> DataLoader[Any]:
        """The hold-out set; of several processes each takes its share, and the metrics count over all."""
        share = range(self.trainer.global_rank, len(self.test), self.trainer.world_size)  # type: ignore[arg-type]
        return DataLoader(self.test, 1, sampler=share)

    def test_dataloader(self) -> DataLoader[Any]:
        """As for validation."""
        return self.val_dataloader()
