"""The methods that are compared: optimizers and balancers by name, from the best to the worst that the paper has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Adam, Optimizer

from lightning_mtadam import MTAdam
from lightning_mtadam.balancers import Balancer, FixedWeights, GradNorm

SHARED = "trunk.6.weight"  # the weights of the last layer that all tasks share, in the network
ALPHA = 0.12  # the paper's for this toy


def terms_of(tasks: int) -> tuple[str, ...]:
    """The names of the losses."""
    return tuple(f"task{index}" for index in range(tasks))


def oracle(sigmas: Sequence[float]) -> FixedWeights:
    """The weights ``1 / sigma_i^2`` of the normalised loss, which no method is told."""
    return FixedWeights({term: sigma**-2 for term, sigma in zip(terms_of(len(sigmas)), sigmas, strict=True)})


def gradnorm(sigmas: Sequence[float]) -> GradNorm:
    """GradNorm, with the paper's alpha."""
    return GradNorm(f"network.{SHARED}", alpha=ALPHA)


@dataclass(frozen=True)
class Method:
    """How the network is trained.

    Attributes:
        optimizer: takes the network's parameters and the learning rate.
        balancer: makes a balancer for tasks of these scales; ``None`` trains on the sum, or MTAdam balances.
        options: more for the optimizer.
    """

    optimizer: Callable[..., Optimizer] = Adam
    balancer: Callable[[Sequence[float]], Balancer] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def has_weights(self) -> bool:
        """Whether it learns a balance."""
        return self.optimizer is MTAdam or self.balancer is gradnorm

    def configure(self, network: nn.Module, lr: float) -> Optimizer:
        """Make the optimizer."""
        return self.optimizer(network.named_parameters(), lr=lr, **self.options)


METHODS = {
    "oracle": Method(balancer=oracle),
    # No task is the main one, so none is the anchor: the geometric mean of all.
    "mtadam": Method(MTAdam, options={"anchor": "mean"}),
    "gradnorm": Method(balancer=gradnorm),
    "equal": Method(),
}
