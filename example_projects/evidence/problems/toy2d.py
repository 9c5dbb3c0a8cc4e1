"""The two-dimensional toy of CAGrad, Nash-MTL and FAMO: a point that walks to the front from five starts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from example_projects.evidence.problems.problem import Part, Problem, seeded

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
JITTER = 0.25  # standard deviation of the starts of all seeds but the first
SCALE = 0.1  # of the first loss, as in FAMO's repository
LOWEST = -21.0  # a bound of both functions
SMALLEST = 5e-6  # where the logarithms are cut off
FRONT_HEIGHT, FRONT_END = -8.3552, 7.0  # the Pareto set: from -7 to 7 at this height


class Point(nn.Module):
    """A point of the plane.

    Args:
        seed: the remainder by five is the start; the first five seeds are exactly there, others near it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        start = torch.tensor(STARTS[seed % len(STARTS)])
        near = seed >= len(STARTS)
        self.position = nn.Parameter(start + near * JITTER * torch.randn(2))


def positive_part(value: Tensor) -> Tensor:
    """With a slope at zero, where one of the starts lies: there the toy's authors had one, from a clamp of then."""
    return torch.where(value >= 0, value, 0.0)


def functions(position: Tensor) -> tuple[Tensor, Tensor]:
    """The two functions, [2] -> two scalars, without the scale of the first.

    References:
        Liu et al., FAMO: Fast Adaptive Multitask Optimization, 2023; ``experiments/toy/problem.py`` of its repository.
    """
    x, y = position
    upper, lower = positive_part(torch.tanh(0.5 * y)), positive_part(torch.tanh(-0.5 * y))
    valleys = (
        (0.5 * (-x - 7) - torch.tanh(-y)).abs().clamp(min=SMALLEST).log() + 6,
        (0.5 * (-x + 3) + torch.tanh(-y) + 2).abs().clamp(min=SMALLEST).log() + 6,
    )
    bowls = [((-x + side).square() + 0.1 * (-y - 8).square()) / 10 - 20 for side in (7, -7)]
    return valleys[0] * upper + bowls[0] * lower, valleys[1] * upper + bowls[1] * lower


def losses(network: Point, batch: None) -> dict[str, Tensor]:
    """Both functions over their lower bound, of which FAMO's authors tell their method too: so they are positive."""
    first, second = functions(network.position)
    return {"first": SCALE * (first - LOWEST), "second": second - LOWEST}


def batches(seed: int, steps: int) -> Iterator[None]:
    """There are no data."""
    return repeat(None, steps)


@torch.no_grad()
def measure(network: Point, part: Part) -> dict[str, float]:
    """The distance from the Pareto set, and how far off its middle the point is: 1 at its ends."""
    x, y = network.position.tolist()
    beyond = max(abs(x) - FRONT_END, 0.0)
    return {"distance": (beyond**2 + (y - FRONT_HEIGHT) ** 2) ** 0.5, "off_the_middle": abs(x) / FRONT_END}


def toy2d() -> Problem:
    """The problem. Failed: from one of the starts the point ends farther than 1 from the Pareto set, 14 long.

    There is nothing to validate on: the search has starts of its own, beside the five.
    """
    return Problem(
        name="toy2d",
        make_network=lambda seed: seeded(partial(Point, seed), seed),
        batches=batches,
        losses=losses,
        terms=("first", "second"),
        anchor="mean",
        shared="position",
        measure=measure,
        figure="distance",
        higher_is_better=False,
        allowed={"distance": (0, 1)},
        steps=300,
        lrs=(1e-3, 1.0),
        starts=len(STARTS),
    )
