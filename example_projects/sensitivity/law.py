"""MTAdam's law, in double precision: what a loss other than the anchor is multiplied by changes nothing.

Powers of two are exact in floating point, and so is then the whole training, to the last digit; but not where several
terms share a layer that the anchor does not reach: it is balanced to a geometric mean there, of logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from example_projects.problems.problem import Problem
from example_projects.sensitivity.grid import factors, first_term
from lightning_mtadam import MTAdam

LR = 3e-3
EPS = 1e-8  # MTAdam's own
NO_EPS = 1e-30  # adds nothing to any gradient but zero


def law(problems: Sequence[Problem], spreads: Sequence[float], steps: int) -> list[dict[str, str]]:
    """A row per problem and ``balance_every``, with the largest deviation by factors that are powers of two, or any.

    The law holds where ``eps`` is nothing beside the gradients. In a layer that the anchor does not reach, which is
    trained as by Adam, a small factor brings gradients down to the usual one: that is the last column.
    """
    return [
        {
            "problem": problem.name,
            "balance_every": str(every),
            "steps": str(steps),
            "powers of two": f"{deviation(problem, spreads, steps, every, to_a_power_of_two):.1e}",
            "any factors": f"{deviation(problem, spreads, steps, every):.1e}",
            f"any factors, eps {EPS:g}": f"{deviation(problem, spreads, steps, every, eps=EPS):.1e}",
        }
        for problem in problems
        for every in (1, 20)
    ]


def as_they_are(factor: float) -> float:
    """The factor."""
    return factor


def to_a_power_of_two(factor: float) -> float:
    """The nearest power of two.

    Example:
        >>> to_a_power_of_two(1e-4) == 2**-13
        True
    """
    return math.ldexp(1.0, round(math.log2(factor)))


def deviation(
    problem: Problem,
    spreads: Sequence[float],
    steps: int,
    balance_every: int,
    rounded: Callable[[float], float] = as_they_are,
    eps: float = NO_EPS,
) -> float:
    """The largest relative difference of a trained loss from the same without factors.

    Args:
        problem: what to train.
        spreads: of the factors.
        steps: how many.
        balance_every: of MTAdam.
        rounded: what is done to the factors.
        eps: of MTAdam.
    """
    exact = trained_losses(problem, dict.fromkeys(problem.terms, 1.0), steps, balance_every, eps)
    largest = 0.0
    for spread in spreads:
        multiplied_by = {name: rounded(factor) for name, factor in factors(problem, spread).items()}
        losses = trained_losses(problem, multiplied_by, steps, balance_every, eps)
        largest = max(largest, ((losses - exact).abs() / exact.abs()).max().item())
    return largest


def trained_losses(
    problem: Problem, multiplied_by: Mapping[str, float], steps: int, balance_every: int, eps: float
) -> Tensor:
    """The losses of a network that MTAdam trained in double precision, at the last batch, without factors. [I]."""
    network = problem.make_network(0).double()
    optimizer = MTAdam(
        network.named_parameters(),
        lr=LR,
        eps=eps,
        terms=problem.terms,
        anchor=first_term(problem),
        balance_every=balance_every,
    )
    for batch in problem.batches(0, steps):
        optimizer.zero_grad()
        losses = problem.losses(network, _double(batch))
        optimizer.backward({name: multiplied_by[name] * loss for name, loss in losses.items()})
        optimizer.step()
    return torch.stack([loss.detach() for loss in problem.losses(network, _double(batch)).values()])


def _double(batch: Any) -> Any:
    """The batch with its floating tensors in double precision."""
    if isinstance(batch, tuple):
        return tuple(_double(part) for part in batch)
    return batch.double() if batch.is_floating_point() else batch
