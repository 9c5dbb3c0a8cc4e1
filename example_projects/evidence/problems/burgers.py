"""Burgers' equation by ConFIG's protocol: a residual, an initial and a boundary loss, at new points in every step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from example_projects.evidence.problems.problem import Part, Problem, seeded

VISCOSITY = 0.01 / math.pi
WIDTH, DEPTH = 50, 4
INNER, INITIAL, BOUNDARY = 2000, 50, 50  # points in a batch
SOLUTION = "burgers/simulation_data.npy"  # of 100 times at 256 places

Batch = dict[str, tuple[Tensor, Tensor]]  # by term: places and times, [N] each


class Net(nn.Module):
    """An input layer and four hidden layers of 50, tanh: places and times, [N] each, to values, [N]."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [2, *[WIDTH] * (1 + DEPTH)]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate."""
        u: Tensor = self.layers(torch.stack([x, t], dim=-1))
        return u.squeeze(-1)


def make_network() -> Net:
    """With ConFIG's initial values, drawn in its order."""
    network = Net()
    for layer in network.layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.constant_(layer.bias, 0.001)
    return network


def latin_hypercube(count: int, dimensions: int, generator: np.random.Generator) -> np.ndarray:
    """Points in the unit cube, one in each of ``count`` equal slices of every axis, [N, D]: as scipy draws them."""
    within = generator.uniform(size=(count, dimensions))
    slices = np.tile(np.arange(1, count + 1), (dimensions, 1))
    for row in slices:
        generator.shuffle(row)
    return (slices.T - within) / count


def batches(seed: int, steps: int) -> Iterator[Batch]:
    """Points that are drawn anew in every step, in ConFIG's order."""
    edges, inner = np.random.default_rng(seed), np.random.default_rng(seed)
    sides = torch.tensor([-1.0, 1.0]).repeat_interleave(BOUNDARY // 2)
    for _ in range(steps):
        places = _tensor(latin_hypercube(INITIAL, 1, edges)[:, 0]) * 2 - 1
        times = _tensor(latin_hypercube(BOUNDARY, 1, edges)[:, 0])
        points = latin_hypercube(INNER, 2, inner)
        yield {
            "residual": (_tensor(points[:, 0]) * 2 - 1, _tensor(points[:, 1])),
            "initial": (places, torch.zeros_like(places)),
            "boundary": (sides, times),
        }


def losses(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What is left of the equation, and of its initial and boundary conditions: mean squares."""
    x, t = (axis.detach().requires_grad_() for axis in batch["residual"])
    u = network(x, t)
    by_x, by_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
    (curvature,) = torch.autograd.grad(by_x.sum(), x, create_graph=True)
    places, start = batch["initial"]
    return {
        "residual": (by_t + u * by_x - VISCOSITY * curvature).square().mean(),
        "initial": (network(places, start) + torch.sin(math.pi * places)).square().mean(),
        "boundary": network(*batch["boundary"]).square().mean(),
    }


@torch.no_grad()
def measure(network: nn.Module, solution: Tensor, part: Part) -> dict[str, float]:
    """The mean squared error, for validation at every second time of the solution, for the test at the others.

    Args:
        network: the trained one.
        solution: [100, 256].
        part: which times.
    """
    times, places = solution.shape
    x, t = torch.linspace(-1 + 1 / places, 1 - 1 / places, places), torch.linspace(0, 1, times)
    grid_t, grid_x = torch.meshgrid(t, x, indexing="ij")
    square = (network(grid_x, grid_t) - solution).square()
    return {"mse": square[int(part == "test") :: 2].mean().item(), "mse_everywhere": square.mean().item()}


def burgers(folder: Path) -> Problem:
    """The problem. Failed: a mean squared error above 0.1; the solution's own mean square is 0.37.

    Args:
        folder: with ``burgers/simulation_data.npy``, of ConFIG's repository.

    References:
        Liu, Chu, Thuerey: ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, ICLR 2025;
        ``docs/examples/pinn_burgers.ipynb`` of its repository, which gives the least error of all steps. Here that
        after the last one counts, and the least on the way is kept beside it.
    """
    solution = torch.from_numpy(np.load(folder / SOLUTION)).float()
    return Problem(
        name="burgers",
        make_network=partial(seeded, make_network),
        batches=batches,
        losses=losses,
        terms=("residual", "initial", "boundary"),
        anchor="residual",
        shared="layers.8",
        measure=lambda network, part: measure(network, solution, part),
        figure="mse",
        higher_is_better=False,
        allowed={"mse": (0, 0.1)},
        steps=5000,
        lrs=(1e-4, 1e-2),
        watched="mse_everywhere",
    )


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()
