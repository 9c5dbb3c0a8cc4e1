"""What a method is: it prepares an optimizer for what it is given, and says how gradients come to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from example_projects.evidence.problems.problem import Problem

Losses: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """What a method is given.

    Attributes:
        problem: its names; the losses are to be taken from :attr:`losses`.
        network: to be trained.
        losses: takes a network and a batch; the terms as they are given, multiplied by factors.
        batches: takes a number of steps.
        lr: learning rate.
        shares: by term, what each loss, over its first value, is weighed by; only for the method that searches weights.
        seed: of the run.
        steps: of the run.
    """

    problem: Problem
    network: nn.Module
    losses: Callable[[nn.Module, Any], Losses]
    batches: Callable[[int], Iterator[Any]]
    lr: float
    shares: Mapping[str, float] | None
    seed: int
    steps: int


@dataclass(frozen=True)
class Training:
    """How one network is trained.

    Attributes:
        optimizer: steps on the gradients.
        backward: takes the losses, and leaves gradients.
    """

    optimizer: Optimizer
    backward: Callable[[Losses], object]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        prepare: what it does first; its time counts.
        label: for tables and figures.
        searches_weights: whether a search draws weights beside the learning rate.
    """

    prepare: Callable[[Setup], Training]
    label: str
    searches_weights: bool = False
