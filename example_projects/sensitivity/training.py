"""One training run, without the Trainer, whose own work would be most of a step of so small a network."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from example_projects.problems.problem import Problem
from example_projects.sensitivity.grid import factors
from example_projects.sensitivity.methods import Method
from lightning_mtadam import NonFiniteError


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        value: the problem's figure at the end, infinite if the run diverged.
        early: the same after a quarter of the steps.
        seconds_per_step: of processor time, without the figures.
    """

    value: float
    early: float
    seconds_per_step: float


def train(problem: Problem, method: Method, spread: float, lr: float, steps: int, seed: int) -> Outcome:
    """Train a network on losses that are multiplied by the factors of a spread.

    Args:
        problem: what to train.
        method: how.
        spread: of the factors.
        lr: learning rate.
        steps: how many.
        seed: of the network's weights and the order of the data.
    """
    network = problem.make_network(seed)
    multiplied_by = factors(problem, spread)
    training = method.prepare(problem, network, multiplied_by, lr)
    early, seconds = math.inf, 0.0
    try:
        for step, batch in enumerate(problem.batches(seed, steps)):
            if step == max(1, steps // 4):
                early = _finite(problem.metric(network))
            start = time.process_time()
            training.optimizer.zero_grad()
            losses = problem.losses(network, batch)
            training.backward({name: multiplied_by[name] * loss for name, loss in losses.items()})
            training.optimizer.step()
            seconds += time.process_time() - start
    except NonFiniteError:
        return Outcome(math.inf, early, seconds / (step + 1))
    return Outcome(_finite(problem.metric(network)), early, seconds / steps)


def _finite(value: float) -> float:
    """The value; infinite, so the worst, if it is not finite."""
    return value if math.isfinite(value) else math.inf
