"""One training run, without the Trainer, whose own work would be most of a step of so small a network."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from example_projects.evidence.method import Method, Setup
from example_projects.evidence.problems.problem import Part, Problem, factors
from lightning_mtadam import NonFiniteError

WATCHED_EVERY = 10  # steps between measurements on the way


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        figures: by part of the data and name; nan if the run diverged.
        seconds: of processor time, for preparing and training, without the figures.
        steps: of all its networks.
    """

    figures: Mapping[Part, Mapping[str, float]]
    seconds: float
    steps: int


def train(
    problem: Problem,
    method: Method,
    lr: float,
    seed: int,
    factor: float = 1.0,
    *,
    shares: Mapping[str, float] | None = None,
    steps: int | None = None,
    parts: Sequence[Part] = ("validation",),
) -> Outcome:
    """Train on losses that are multiplied by factors, and measure.

    Args:
        problem: what to train.
        method: how.
        lr: learning rate.
        seed: of the network's weights, the order of the data, and what is drawn in training.
        factor: see :func:`~example_projects.evidence.problems.problem.factors`.
        shares: weights of the method that searches them.
        steps: how many; the problem's unless given.
        parts: of the data, to measure on.
    """
    steps = problem.steps if steps is None else steps
    seconds, found = 0.0, []
    for start in range(problem.starts):
        own_seed = seed * problem.starts + start
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own_seed)
            setup = make_setup(problem, lr, own_seed, factor, shares, steps)
            own, seen = watch(problem, setup.network, parts, step_by_step(method, setup))
        seconds += own
        setup.network.eval()
        found.append({part: with_least(problem, problem.measure(setup.network, part), seen[part]) for part in parts})
    return Outcome(
        {part: worst(problem, [each[part] for each in found]) for part in parts}, seconds, steps * len(found)
    )


def make_setup(
    problem: Problem, lr: float, seed: int, factor: float, shares: Mapping[str, float] | None, steps: int
) -> Setup:
    """A network and its losses, multiplied by factors."""
    multiplied_by = factors(problem, factor)

    def losses(network: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {name: multiplied_by[name] * loss for name, loss in problem.losses(network, batch).items()}

    def batches(count: int) -> Iterator[Any]:
        return problem.batches(seed, count)

    return Setup(problem, problem.make_network(seed), losses, batches, lr, shares, seed, steps)


def step_by_step(method: Method, setup: Setup) -> Iterator[float]:
    """Train, and give the processor seconds of each step; those of preparing count for the first.

    A network that diverges ends with nan in its parameters.
    """
    begin = time.process_time()
    try:
        training = method.prepare(setup)
        for batch in setup.batches(setup.steps):
            training.optimizer.zero_grad()
            training.backward(setup.losses(setup.network, batch))
            training.optimizer.step()
            yield time.process_time() - begin
            begin = time.process_time()
    except NonFiniteError:
        with torch.no_grad():
            for parameter in setup.network.parameters():
                parameter.fill_(math.nan)


def watch(
    problem: Problem, network: nn.Module, parts: Sequence[Part], steps: Iterator[float]
) -> tuple[float, dict[Part, list[float]]]:
    """Train to the end, and look at the figure that is watched on the way, if one is.

    Args:
        problem: whose figure it is.
        network: that is trained.
        parts: of the data, to measure on.
        steps: trains, and gives the seconds of each step.

    Returns:
        The seconds of all steps, without those of measuring; and what was seen, by part.
    """
    seconds = 0.0
    seen: dict[Part, list[float]] = {part: [] for part in parts}
    for step, own in enumerate(steps):
        seconds += own
        if problem.watched and step % WATCHED_EVERY == 0:
            network.eval()
            for part, values in seen.items():
                values.append(problem.measure(network, part)[problem.watched])
            network.train()
    return seconds, seen


def with_least(problem: Problem, figures: Mapping[str, float], seen: Sequence[float]) -> dict[str, float]:
    """The figures at the end, with the least on the way beside them, if one is watched."""
    if problem.watched is None:
        return dict(figures)
    return {**figures, f"least_{problem.watched}": min(figures[problem.watched], *seen)}


def worst(problem: Problem, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the figures of several networks those of the worst; nan is worse than everything."""
    chosen = found[0]
    for figures in found[1:]:
        if problem.better(chosen[problem.figure], figures[problem.figure]):
            chosen = figures
    return dict(chosen)
