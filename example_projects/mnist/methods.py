"""The methods that are compared: optimizers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from lightning_mtadam import MTAdam


@dataclass(frozen=True)
class Method:
    """How the network is trained.

    Attributes:
        optimizer: takes the network's parameters and the learning rate.
        balanced: whether the prescribed (equal) weights are used in place of the unbalanced ones.
        options: more for the optimizer.
    """

    optimizer: Callable[..., Optimizer]
    balanced: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def configure(self, network: nn.Module, lr: float) -> Optimizer:
        """Make the optimizer."""
        return self.optimizer(network.named_parameters(), lr=lr, **self.options)


# Ten classes are equals, of which any may be satisfied first, so the anchor is their geometric mean.
EQUALS = {"anchor": "mean"}

METHODS = {
    "mtadam": Method(MTAdam, options=EQUALS),
    "mtadam-first-anchor": Method(MTAdam),
    **{f"mtadam-every-{k}": Method(MTAdam, options={**EQUALS, "balance_every": k}) for k in (5, 20, 50, 200)},
    "adam": Method(Adam),
    "balanced-adam": Method(Adam, balanced=True),
    "rmsprop": Method(RMSprop),
    "sgd": Method(partial(SGD, momentum=0.9)),
    # The ablations of the paper's Table 5, i to v, by what they take away.
    "mtadam-i-no-balancing": Method(MTAdam, options={"anchor": None}),
    "mtadam-ii-not-per-layer": Method(MTAdam, options={**EQUALS, "layers": "global"}),
    "mtadam-iii-unit-norm": Method(MTAdam, options={"anchor": "unit"}),
    "mtadam-iv-own-second-moment": Method(MTAdam, options={**EQUALS, "denominator": "own"}),
    "mtadam-v-no-norm-average": Method(MTAdam, options={**EQUALS, "betas": (0.9, 0.999, 0.0)}),
}
