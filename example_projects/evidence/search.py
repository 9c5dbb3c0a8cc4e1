"""Random search: which learning rates and weights a method tries, which it takes, and how soon it was good."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from example_projects.evidence.problems.problem import Problem

USUAL_LR = 1e-3  # of Adam and of MTAdam: what a user tries first
DECADES = 4.0  # how far up or down a weight may go
FIRST_SEED = 1000  # of a search; those of the test are smaller


@dataclass(frozen=True)
class Candidate:
    """What a run is tried with.

    Attributes:
        lr: learning rate.
        shares: by term, what each loss, over its first value, is weighed by; ``None`` for the losses as they are.
    """

    lr: float
    shares: Mapping[str, float] | None = None


def candidate(problem: Problem, trial: int, *, weights: bool) -> Candidate:
    """The candidate of a trial; all methods try the same learning rates in the same order, whatever the factors.

    The first is the usual learning rate, with the losses as they are. Further learning rates are uniform on a
    logarithmic scale. So are the shares of the terms but the first, from ``10^-s`` to ``10^s``, with s itself uniform
    from 0 to 4: of many terms not all should be far off.

    Args:
        problem: that is searched for.
        trial: from 0 on.
        weights: whether shares are drawn.
    """
    if trial == 0:
        return Candidate(USUAL_LR)
    generator = random.Random(f"{problem.name} {trial}")
    low, high = problem.lrs
    lr = _rounded(low * (high / low) ** generator.random())
    if not weights:
        return Candidate(lr)
    reach = DECADES * generator.random()
    first, *others = problem.terms
    return Candidate(lr, {first: 1.0, **{term: _rounded(10 ** generator.uniform(-reach, reach)) for term in others}})


def affordable(spent: Sequence[float], budget: float) -> bool:
    """Whether another trial, as long as those before were on average, is within the budget; the first always is.

    Args:
        spent: the seconds of the trials so far.
        budget: in seconds.
    """
    return not spent or sum(spent) * (1 + 1 / len(spent)) <= budget


def replay(trials: Sequence[tuple[float, float]], seconds: Sequence[float], repeats: int = 200) -> list[list[float]]:
    """What the best trial had reached after so many seconds, with the trials in other orders.

    Args:
        trials: seconds and figure of each, the smaller figure the better.
        seconds: when to look.
        repeats: how many orders.

    Returns:
        For each time the best figure of every order, infinite where no trial had ended.

    Example:
        >>> replay([(2.0, 0.5)], [1.0, 3.0], repeats=1)
        [[inf], [0.5]]
    """
    generator = random.Random(0)
    found: list[list[float]] = [[] for _ in seconds]
    for _ in range(repeats):
        order = generator.sample(trials, len(trials))
        for at, limit in enumerate(seconds):
            spent, best = 0.0, math.inf
            for cost, value in order:
                spent += cost
                if spent > limit:
                    break
                best = min(best, value)
            found[at].append(best)
    return found


def _rounded(value: float) -> float:
    """To the digits that the file keeps."""
    return float(f"{value:.4g}")
