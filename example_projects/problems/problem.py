"""What a problem is, and what its parts need: seeded networks, and batches in an order that depends on a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """One network, several losses, and a figure that says how well it was trained.

    Attributes:
        name: of the problem.
        make_network: takes a seed.
        batches: takes a seed and the number of steps, and iterates over as many batches.
        losses: takes the network and a batch, and returns the raw terms, without any weights.
        anchor: of MTAdam, a term's name or a policy.
        balanced_weights: by term, for a plain weighted sum: known to be good.
        given_weights: takes a seed; by term, those the problem comes with, which its solver has not chosen.
        metrics: takes the trained network, and returns figures by name.
        metric_name: the one that counts.
        higher_is_better: whether it is the larger, the better.
        steps: after which Adam gains little.
        lr: a learning rate that is good for Adam with the balanced weights.
    """

    name: str
    make_network: Callable[[int], nn.Module]
    batches: Callable[[int, int], Iterator[Any]]
    losses: Callable[[nn.Module, Any], dict[str, Tensor]]
    anchor: str
    balanced_weights: Mapping[str, float]
    given_weights: Callable[[int], Mapping[str, float]]
    metrics: Callable[[nn.Module], dict[str, float]]
    metric_name: str
    higher_is_better: bool
    steps: int
    lr: float = 1e-3

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the losses."""
        return tuple(self.balanced_weights)

    def metric(self, network: nn.Module) -> float:
        """The figure that counts."""
        return self.metrics(network)[self.metric_name]


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a network with the weights of a seed, and leave the random numbers of others alone."""
    with torch.random.fork_rng():
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
