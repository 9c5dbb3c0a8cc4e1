"""The pinn project's equation: a residual and a boundary loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from example_projects.evidence.problems.problem import Part, Problem, seeded
from example_projects.pinn.data import TEST_POINTS, TRAINING_POINTS
from example_projects.pinn.network import Net
from example_projects.pinn.problem import grid, pinn_losses, relative_error


def batches(seed: int, steps: int) -> Iterator[Tensor]:
    """All points at every step, whatever the seed."""
    return repeat(grid(TRAINING_POINTS), steps)


def losses(network: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """The residual of the equation, and of its boundary conditions."""
    x = batch.detach().requires_grad_()
    return pinn_losses(network(x), x)


@torch.no_grad()
def measure(network: nn.Module, part: Part) -> dict[str, float]:
    """The L2 norm of the error over that of the solution; for validation between the points of the test."""
    x = grid(TEST_POINTS)
    x = (x[1:] + x[:-1]) / 2 if part == "validation" else x
    return {"relative_error": relative_error(network(x), x).item()}


def equation() -> Problem:
    """The problem. Failed: a relative error above 0.3; that of the straight line between the boundaries is 0.76."""
    return Problem(
        name="equation",
        make_network=partial(seeded, Net),
        batches=batches,
        losses=losses,
        terms=("residual", "boundary"),
        anchor="residual",
        shared="layers.6",
        measure=measure,
        figure="relative_error",
        higher_is_better=False,
        allowed={"relative_error": (0, 0.3)},
        steps=1200,
    )
