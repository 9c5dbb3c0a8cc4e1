"""The same points at every step."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from example_projects.common.exact_resume import EpochSampler
from example_projects.pinn.problem import grid

TRAINING_POINTS, TEST_POINTS = 64, 501


class Repeated(Dataset[Tensor]):
    """One batch, again and again.

    Args:
        batch: of any shape.
        times: how often.
    """

    def __init__(self, batch: Tensor, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, index: int) -> Tensor:
        return self.batch


class Points(pl.LightningDataModule):
    """All points of a grid, once a step.

    Args:
        steps: of an epoch.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self) -> DataLoader[Tensor]:
        """The training points, ``steps`` times; a resumed run gets the steps that are left."""
        left = EpochSampler(self.steps, 1, 0, self.trainer)
        return DataLoader(Repeated(grid(TRAINING_POINTS), self.steps), None, sampler=left, generator=torch.Generator())

    def test_dataloader(self) -> DataLoader[Tensor]:
        """The test points, once."""
        return DataLoader(Repeated(grid(TEST_POINTS), 1), None)
