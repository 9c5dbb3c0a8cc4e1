"""The functions to be learned, and samples of them: new ones at every step."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from example_projects.common.exact_resume import EpochSampler

INPUTS, OUTPUTS = 250, 100
COMMON, OWN = 10.0, 3.5  # standard deviations of the elements of B and of eps_i
BATCH_SIZE, TEST_SAMPLES = 100, 1000

# The paper's for two tasks. For ten it names none: here they are equally far apart on a logarithmic scale.
SIGMAS = {2: (1.0, 100.0), 10: tuple(10 ** (2 * index / 9) for index in range(10))}


def make_matrices(tasks: int, seed: int) -> Tensor:
    """``B + eps_i`` for each task. [T, 100, 250]."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(OUTPUTS, INPUTS, generator=generator)
    return COMMON * common + OWN * torch.randn(tasks, OUTPUTS, INPUTS, generator=generator)


def targets(x: Tensor, matrices: Tensor, sigmas: Sequence[float]) -> Tensor:
    """``sigma_i tanh((B + eps_i) x)``. [N, 250], [T, 100, 250] -> [T, N, 100]."""
    return torch.tensor(sigmas)[:, None, None] * torch.tanh(x @ matrices.mT)


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Batches of inputs, drawn from the normal distribution, and what each task makes of them.

    Args:
        matrices: of the tasks, [T, 100, 250].
        sigmas: their scales.
        batches: how many.
        batch_size: samples in each.
        seed: with the index of a batch it tells all its samples.
    """

    def __init__(self, matrices: Tensor, sigmas: Sequence[float], batches: int, batch_size: int, seed: int) -> None:
        self.matrices, self.sigmas = matrices, sigmas
        self.batches, self.batch_size, self.seed = batches, batch_size, seed

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        x = torch.randn(self.batch_size, INPUTS, generator=generator)
        return x, targets(x, self.matrices, self.sigmas)


class Tasks(pl.LightningDataModule):
    """The tasks of a seed.

    Args:
        sigmas: scales of the tasks.
        steps: of an epoch.
        seed: of the functions and the samples.
    """

    def __init__(self, sigmas: Sequence[float], steps: int, seed: int) -> None:
        super().__init__()
        self.steps, self.seed = steps, seed
        matrices = make_matrices(len(sigmas), seed)
        self.training = Samples(matrices, sigmas, steps, BATCH_SIZE, seed)
        self.held_out = Samples(matrices, sigmas, 1, TEST_SAMPLES, -1 - seed)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """A batch per step; a resumed run gets those that are left."""
        left = EpochSampler(self.steps, 1, self.seed, self.trainer)
        return DataLoader(self.training, None, sampler=left, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The held-out samples, for the curves."""
        return DataLoader(self.held_out, None)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The same held-out samples."""
        return DataLoader(self.held_out, None)
