"""MTAdam's law, in double precision: what a loss other than the anchor is multiplied by changes nothing.

Powers of two are exact in floating point, and so is then the whole training, to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from example_projects.problems.problem import Problem
from example_projects.sensitivity.grid import factors, first_term
from lightning_mtadam import MTAdam

LR = 3e-3


def law(problems: Sequence[Problem], spreads: Sequence[float], steps: int) -> list[dict[str, str]]:
    """A row per problem and ``balance_every``: the largest deviation with factors as they are, and as powers of two."""
    return [
        {
            "problem": problem.name,
            "balance_every": str(every),
            "steps": str(steps),
            "powers of two": f"{deviation(problem, spreads, steps, every, powers_of_two=True):.1e}",
            "any factors": f"{deviation(problem, spreads, steps, every, powers_of_two=False):.1e}",
        }
        for problem in problems
        for every in (1, 20)
    ]


def deviation(
    problem: Problem, spreads: Sequence[float], steps: int, balance_every: int, *, powers_of_two: bool
) -> float:
    """The largest relative difference of a trained loss from the same without factors.

    Args:
        problem: what to train.
        spreads: of the factors.
        steps: how many.
        balance_every: of MTAdam.
        powers_of_two: round the factors to such.
    """
    multiplied_by = [factors(problem, spread) for spread in spreads]
    if powers_of_two:
        multiplied_by = [{name: rounded(factor) for name, factor in by.items()} for by in multiplied_by]
    exact = trained_losses(problem, dict.fromkeys(problem.terms, 1.0), steps, balance_every)
    found = [trained_losses(problem, by, steps, balance_every) for by in multiplied_by]
    return max(((losses - exact).abs() / exact.abs()).max().item() for losses in found)


def rounded(factor: float) -> float:
    """The nearest power of two.

    Example:
        >>> rounded(1e-4) == 2**-13
        True
    """
    return math.ldexp(1.0, round(math.log2(factor)))


def trained_losses(problem: Problem, multiplied_by: Mapping[str, float], steps: int, balance_every: int) -> Tensor:
    """The losses of a network that MTAdam trained in double precision, at the last batch, without factors. [I]."""
    network = problem.make_network(0).double()
    optimizer = MTAdam(
        network.named_parameters(),
        lr=LR,
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
