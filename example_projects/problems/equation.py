"""The network for an equation: a residual and a boundary loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from example_projects.pinn.data import TEST_POINTS, TRAINING_POINTS
from example_projects.pinn.methods import ANCHOR
from example_projects.pinn.network import Net
from example_projects.pinn.problem import grid, pinn_losses, relative_error
from example_projects.problems.problem import Problem, seeded


def batches(seed: int, steps: int) -> Iterator[Tensor]:
    """All points at every step, whatever the seed."""
    return repeat(grid(TRAINING_POINTS), steps)


def losses(network: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """The residual of the equation, and of its boundary conditions."""
    x = batch.detach().requires_grad_()
    return pinn_losses(network(x), x)


@torch.no_grad()
def metrics(network: nn.Module) -> dict[str, float]:
    """The L2 norm of the error over that of the solution."""
    x = grid(TEST_POINTS)
    return {"relative_error": relative_error(network(x), x).item()}


def equation() -> Problem:
    """The problem."""
    return Problem(
        name="equation",
        make_network=partial(seeded, Net),
        batches=batches,
        losses=losses,
        anchor=ANCHOR["anchor"],
        balanced_weights={"residual": 1.0, "boundary": 1e3},
        given_weights=lambda seed: {"residual": 1.0, "boundary": 1.0},
        metrics=metrics,
        metric_name="relative_error",
        higher_is_better=False,
        steps=2500,
    )
