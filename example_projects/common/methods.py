"""The methods that are compared: optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from lightning_mtadam import MTAdam


@dataclass(frozen=True)
class Method:
    """How a network is trained.

    Attributes:
        optimizer: takes named parameters and the learning rate.
        balanced: whether the prescribed weights of the losses are used in place of the unbalanced ones.
        options: more for the optimizer.
        norm_decay: decay of MTAdam's gradient norms, the third of its betas.
    """

    optimizer: Callable[..., Optimizer]
    balanced: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    norm_decay: float = 0.9

    def configure(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float, betas: tuple[float, float] = (0.9, 0.999)
    ) -> Optimizer:
        """Make the optimizer; those that have no ``betas`` go without."""
        options = dict(self.options)
        if self.optimizer is Adam:
            options["betas"] = betas
        elif self.optimizer is MTAdam:
            options["betas"] = (*betas, self.norm_decay)
        return self.optimizer(named_parameters, lr=lr, **options)


# The rivals of the paper, on the plain sum of the losses.
RIVALS = {
    "adam": Method(Adam),
    "balanced-adam": Method(Adam, balanced=True),
    "rmsprop": Method(RMSprop),
    "sgd": Method(partial(SGD, momentum=0.9)),
}


def ablations(anchor: str = "first") -> dict[str, Method]:
    """The ablations of the paper's Table 5, i to v, by what they take away."""
    anchored = {"anchor": anchor}
    return {
        "mtadam-i-no-balancing": Method(MTAdam, options={"anchor": None}),
        "mtadam-ii-not-per-layer": Method(MTAdam, options={**anchored, "layers": "global"}),
        "mtadam-iii-unit-norm": Method(MTAdam, options={"anchor": "unit"}),
        "mtadam-iv-own-second-moment": Method(MTAdam, options={**anchored, "denominator": "own"}),
        "mtadam-v-no-norm-average": Method(MTAdam, options=anchored, norm_decay=0.0),
    }


# Of images the first term is the pixels': the anchor, as in the paper.
IMAGE_METHODS = {"mtadam": Method(MTAdam), **RIVALS, **ablations()}
