"""The methods that are compared: optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from lightning_mtadam import MTAdam

NORM_DECAY = 0.9  # of MTAdam's gradient norms, the third of its betas


@dataclass(frozen=True)
class Method:
    """How a network is trained.

    Attributes:
        optimizer: takes named parameters and the learning rate.
        balanced: whether the prescribed weights of the losses are used in place of the unbalanced ones.
        options: more for the optimizer.
    """

    optimizer: Callable[..., Optimizer]
    balanced: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def configure(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        terms: Sequence[str] | None = None,
    ) -> Optimizer:
        """Make the optimizer; those that have no ``betas`` go without, and all but MTAdam without ``terms``."""
        options = dict(self.options)
        if self.optimizer is Adam:
            options["betas"] = betas
        elif self.optimizer is MTAdam:
            options |= {"betas": (*betas, NORM_DECAY), "terms": terms}
        return self.optimizer(named_parameters, lr=lr, **options)

    def anchored(self, anchor: str) -> Method:
        """The method with another anchor, where it has the first term's.

        Example:
            >>> Method(MTAdam).anchored("gan").options
            {'anchor': 'gan'}
        """
        if self.optimizer is not MTAdam or self.options.get("anchor", "first") != "first":
            return self
        return replace(self, options={**self.options, "anchor": anchor})

    def on(self, terms: Iterable[str]) -> Method:
        """The method for these terms: an importance that is given to a kind goes to every term of that kind.

        Example:
            >>> gentle = Method(MTAdam, options={"importance": {"gan": 0.1}})
            >>> gentle.on(["cycle_A", "gan_A", "gan_B"]).options
            {'importance': {'gan_A': 0.1, 'gan_B': 0.1}}
        """
        if "importance" not in self.options:
            return self
        kinds = self.options["importance"]
        known = {term: kinds[kind] for term in terms if (kind := term.partition("_")[0]) in kinds}
        return replace(self, options={**self.options, "importance": known})


# The rivals of the paper, on the plain sum of the losses.
RIVALS = {
    "adam": Method(Adam),
    "balanced-adam": Method(Adam, balanced=True),
    "rmsprop": Method(RMSprop),
    "sgd": Method(partial(SGD, momentum=0.9)),
}


def ablations(anchor: str = "first") -> dict[str, Method]:
    """The ablations of the paper's Table 5, i to v, by what they change in its Algorithm 1."""
    anchored = {"anchor": anchor}
    return {
        "mtadam-i-no-balancing": Method(MTAdam, options={"anchor": None}),
        "mtadam-ii-not-per-layer": Method(MTAdam, options={**anchored, "layers": "global"}),
        "mtadam-iii-unit-norm": Method(MTAdam, options={"anchor": "unit"}),
        "mtadam-iv-own-second-moment": Method(MTAdam, options={**anchored, "denominator": "own"}),
        "mtadam-v-mean-second-moment": Method(MTAdam, options={**anchored, "denominator": "mean"}),
    }


# The setting to begin with, by the documentation; it is not the paper's algorithm.
RECOMMENDED = Method(MTAdam, options={"balance_every": 50})

# Line 2 of Algorithm 1 to the letter, where the authors' code and the default begin with the first norm.
NORMS_FROM_ONE = Method(MTAdam, options={"norm_init": "one"})

# Of images the first term is the pixels': the anchor, as in the paper.
IMAGE_METHODS = {
    "mtadam": Method(MTAdam),
    "mtadam-every-50": RECOMMENDED,
    "mtadam-norms-from-one": NORMS_FROM_ONE,
    "mtadam-gan-0.1": Method(MTAdam, options={"importance": {"gan": 0.1}}),
    **RIVALS,
    **ablations(),
}
