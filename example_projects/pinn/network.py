"""A small network with smooth activations."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

WIDTH, DEPTH = 32, 3


class Net(nn.Module):
    """Three hidden layers of 32: points [N, 1] to values [N, 1]."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [1, *[WIDTH] * DEPTH]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.layers = nn.Sequential(*hidden, nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate."""
        u: Tensor = self.layers(x)
        return u
