"""The methods that are compared: optimizers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Adam, Optimizer

from lightning_mtadam import MTAdam


@dataclass(frozen=True)
class Method:
    """How the network is trained.

    Attributes:
        optimizer: takes the network's parameters and the learning rate.
        boundary_weight: a weight of the boundary loss, set by hand.
        options: more for the optimizer.
    """

    optimizer: Callable[..., Optimizer]
    boundary_weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def configure(self, network: nn.Module, lr: float) -> Optimizer:
        """Make the optimizer."""
        return self.optimizer(network.named_parameters(), lr=lr, **self.options)


# The boundary is satisfied first: with it as the anchor the equation would be scaled away.
ANCHOR = {"anchor": "residual"}

METHODS = {
    "adam": Method(Adam),
    **{f"adam-weight-{weight:g}": Method(Adam, boundary_weight=weight) for weight in (1e2, 1e3, 1e4)},
    "mtadam": Method(MTAdam, options=ANCHOR),
    **{f"mtadam-every-{k}": Method(MTAdam, options={**ANCHOR, "balance_every": k}) for k in (5, 20, 50, 200)},
    "mtadam-boundary-anchor": Method(MTAdam, options={"anchor": "boundary"}),
}
