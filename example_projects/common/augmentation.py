"""Random augmentation that a resumed run repeats exactly: its random numbers come with the index of the sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from example_projects.common.exact_resume import EpochSampler

Draw = tuple[int, int]  # the index of a sample, and the seed of its augmentation


class DrawSampler(Sampler[Draw]):
    """The order of an :class:`~example_projects.common.exact_resume.EpochSampler`, a seed with every index.

    The seed depends on the sampler's seed, the epoch and the index alone, so neither workers nor processes nor a resume
    change what is drawn.
    """

    def __init__(self, order: EpochSampler) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.order.trainer.current_epoch
        for index in self.order:
            yield index, ((self.order.seed * 1_000_003 + epoch) * 1_000_003 + index) % 2**63


def generator_of(seed: int) -> torch.Generator:
    """The random numbers of a draw."""
    return torch.Generator().manual_seed(seed)


def random_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A square out of an image. [C, H, W] -> [C, size, size]."""
    top, left = (int(torch.randint(extent - size + 1, (), generator=generator)) for extent in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def random_flip(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror left and right in one of two cases. [C, H, W]."""
    return image.flip(2) if torch.rand((), generator=generator) < 0.5 else image
