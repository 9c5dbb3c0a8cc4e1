"""The toy of the GradNorm paper: two regression tasks ``sigma_i tanh((B + eps_i) x)`` whose scales differ by 100.

The paper has 250 inputs and 100 outputs; here there are fewer, so that a run of seconds gets somewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from example_projects.evidence.problems.problem import Part, Problem, seeded

SIGMAS = (1.0, 100.0)  # the paper's
INPUTS, OUTPUTS = 50, 20
COMMON, OWN = 10.0, 3.5  # standard deviations of the elements of B and of eps_i
WIDTH, DEPTH = 100, 4
BATCH, HELD_OUT = 100, 1000
TERMS = tuple(f"task{index}" for index in range(len(SIGMAS)))

Batch = tuple[Tensor, Tensor]  # inputs [N, 50] and what the tasks make of them, [T, N, 20]


class Net(nn.Module):
    """A trunk of four layers of 100 with ReLU, and an affine head per task: [N, 50] to [T, N, 20].

    Args:
        seed: of the functions that it is to learn, which travel with it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        sizes = [INPUTS, *[WIDTH] * DEPTH]
        self.trunk = nn.Sequential(*(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, OUTPUTS) for _ in SIGMAS)
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        """Predict all tasks."""
        features = self.trunk(x)
        return torch.stack([head(features) for head in self.heads])


def make_matrices(seed: int) -> Tensor:
    """``B + eps_i`` for each task. [T, 20, 50]."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(OUTPUTS, INPUTS, generator=generator)
    return COMMON * common + OWN * torch.randn(len(SIGMAS), OUTPUTS, INPUTS, generator=generator)


def samples(matrices: Tensor, count: int, generator: torch.Generator) -> Batch:
    """Inputs from the normal distribution, and ``sigma_i tanh((B + eps_i) x)``."""
    x = torch.randn(count, INPUTS, generator=generator)
    return x, torch.tensor(SIGMAS)[:, None, None] * torch.tanh(x @ matrices.mT)


def batches(seed: int, steps: int) -> Iterator[Batch]:
    """New samples at every step."""
    matrices, generator = make_matrices(seed), torch.Generator().manual_seed(2 * seed)
    return (samples(matrices, BATCH, generator) for _ in range(steps))


def losses(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The mean squared error of each task."""
    x, wanted = batch
    return {term: F.mse_loss(*pair) for term, pair in zip(TERMS, zip(network(x), wanted, strict=True), strict=True)}


@torch.no_grad()
def measure(network: Net, part: Part) -> dict[str, float]:
    """The sum of ``L_i / sigma_i^2`` on held-out samples, and the worst task's: nearly 1 if the network says 0."""
    generator = torch.Generator().manual_seed(-1 - 2 * network.seed - (part == "test"))
    found = losses(network, samples(make_matrices(network.seed), HELD_OUT, generator))
    normalised = [loss.item() / sigma**2 for loss, sigma in zip(found.values(), SIGMAS, strict=True)]
    return {
        "normalised_loss": sum(normalised),
        "worst_task": max(normalised, key=lambda loss: (math.isnan(loss), loss)),
    }


def gradnorm_toy() -> Problem:
    """The problem. Failed: a task is hardly learned, nine tenths of its variance is left."""
    return Problem(
        name="gradnorm_toy",
        make_network=lambda seed: seeded(partial(Net, seed), seed),
        batches=batches,
        losses=losses,
        terms=TERMS,
        anchor="mean",
        shared="trunk.6",
        measure=measure,
        figure="normalised_loss",
        higher_is_better=False,
        allowed={"worst_task": (0, 0.9)},
        steps=800,
    )
