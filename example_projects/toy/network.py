"""The network of the paper."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from example_projects.toy.data import INPUTS, OUTPUTS

WIDTH, DEPTH = 100, 4


class Net(nn.Module):
    """A trunk of four layers of 100 with ReLU, and an affine head per task: [N, 250] to [N, 100] for each.

    Args:
        tasks: how many.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__()
        sizes = [INPUTS, *[WIDTH] * DEPTH]
        self.trunk = nn.Sequential(*(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, OUTPUTS) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Predict all tasks."""
        features = self.trunk(x)
        return [head(features) for head in self.heads]
