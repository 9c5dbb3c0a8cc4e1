"""What a problem is, and what its parts need: seeded networks, and batches in an order that depends on a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Part: TypeAlias = Literal["validation", "test"]
Figures: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """One network, several losses, and a figure that says how well it was trained.

    Attributes:
        name: of the problem.
        make_network: takes a seed.
        batches: takes a seed and the number of steps, and iterates over as many batches.
        losses: takes the network and a batch, and returns the raw terms, without any weights. A term may be absent.
        terms: the names of the losses, the main one first, if there is one.
        anchor: for methods that need one: a term's name, or "mean" where no term is the main one.
        shared: the name of the last layer that all terms share.
        measure: takes the trained network and a part of the data, and returns figures by name.
        figure: the one that counts. Learning rates and weights are chosen by it on the validation part.
        higher_is_better: whether it is the larger, the better.
        allowed: by figure, the smallest and the largest value of a run that has not failed. Set before the runs.
        steps: of a run.
        lrs: the smallest and the largest learning rate that a search tries.
        starts: how many networks a run trains, one after the other; its figures are those of the worst.
        watched: a figure whose least value on the way is kept too, if published ones are of that kind.
    """

    name: str
    make_network: Callable[[int], nn.Module]
    batches: Callable[[int, int], Iterator[Any]]
    losses: Callable[[Any, Any], dict[str, Tensor]]
    terms: tuple[str, ...]
    anchor: str
    shared: str
    measure: Callable[[Any, Part], dict[str, float]]
    figure: str
    higher_is_better: bool
    allowed: Mapping[str, tuple[float, float]]
    steps: int
    lrs: tuple[float, float] = (1e-4, 1e-1)
    starts: int = 1
    watched: str | None = None

    def failed(self, figures: Figures) -> bool:
        """Whether a figure is not finite, or outside what is allowed."""
        finite = all(math.isfinite(value) for value in figures.values())
        return not finite or any(not low <= figures[name] <= high for name, (low, high) in self.allowed.items())

    def better(self, one: float, other: float) -> bool:
        """Whether the first of two values of :attr:`figure` is the better one; a nan never is."""
        if math.isnan(one) or math.isnan(other):
            return math.isnan(other) and not math.isnan(one)
        return one > other if self.higher_is_better else one < other


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a network with the weights of a seed, and leave the random numbers of others alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def shuffled_batches(data: tuple[Tensor, ...], size: int, seed: int, steps: int) -> Iterator[tuple[Tensor, ...]]:
    """Epoch after epoch in a new order, whole batches only.

    Args:
        data: tensors [N, ...].
        size: of a batch.
        seed: of the orders.
        steps: how many batches in all.

    Example:
        >>> [batch.tolist() for (batch,) in shuffled_batches((torch.zeros(5),), 2, 0, 3)]
        [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        for rows in torch.randperm(len(data[0]), generator=generator).split(size):
            if len(rows) < size or done == steps:
                break
            yield tuple(tensor[rows] for tensor in data)
            done += 1


def factors(problem: Problem, factor: float) -> dict[str, float]:
    """What multiplies each loss, unknown to the methods.

    The first term keeps its loss. The others are multiplied by factors that go in equal ratios up, or down, to the
    given one: of two losses the second by it, of ten the last by it and each by as much more than the one before.

    Args:
        problem: whose losses they are.
        factor: the last one.
    """
    last = len(problem.terms) - 1
    return {term: factor ** (rank / last) for rank, term in enumerate(problem.terms)}
