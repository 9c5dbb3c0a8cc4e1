"""The optimizer's options: what is allowed, and the errors when it is not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from torch.nn.parameter import is_lazy

from lightning_mtadam.balancing import NormInit
from lightning_mtadam.groups import check_numbers
from lightning_mtadam.importance import check_importance
from lightning_mtadam.layers import LAYER_RULES, LayerRule
from lightning_mtadam.layout import overlaps
from lightning_mtadam.optim.light import SUM
from lightning_mtadam.terms import ANCHOR_POLICIES, check_anchor

Denominator: TypeAlias = Literal["max", "mean", "own", "sum"]
Update: TypeAlias = Literal["sum", "mean"]
OnNonfinite: TypeAlias = Literal["raise", "skip"]


@dataclass(frozen=True)
class Options:
    """What holds for the whole optimizer; learning rate, betas and the like belong to its parameter groups.

    ``importance`` alone changes: it is that of the last backward pass, what the groups said then.
    """

    anchor: str | None = "first"
    importance: dict[str, float] = field(default_factory=dict)
    layers: LayerRule = "parameter"
    norm_init: NormInit = "first"
    denominator: Denominator = "max"
    update: Update = "sum"
    max_scale: float = math.inf
    on_nonfinite: OnNonfinite = "raise"
    compile: bool = False
    balance_every: int = 1
    low_memory: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.balance_every, int):
            raise TypeError(f"balance_every must be a whole number, but got {self.balance_every!r}.")
        if self.balance_every < 1:
            raise ValueError(f"balance_every must be at least 1, but got {self.balance_every!r}.")
        if self.balance_every > 1 and (self.layers, self.denominator) != ("global", "sum"):
            raise ValueError(
                f"balance_every={self.balance_every} differentiates one weighted sum in most steps: each term has one"
                " weight for the whole network, and the sum one second moment. Leave out layers and denominator, or"
                f" give layers='global' and denominator='sum'; got {self.layers!r} and {self.denominator!r}."
            )
        if self.low_memory:
            self._check_low_memory()
        choices = {"norm_init": NormInit, "denominator": Denominator, "update": Update, "on_nonfinite": OnNonfinite}
        for name, choice in choices.items():
            _check_choice(name, getattr(self, name), get_args(choice))
        if not callable(self.layers):
            _check_choice("layers", self.layers, LAYER_RULES, "or a callable: parameter name -> layer name")
        if self.anchor is not None and not isinstance(self.anchor, str):
            raise TypeError(f"anchor must be one of {ANCHOR_POLICIES}, a term's name or None, but got {self.anchor!r}.")
        if not isinstance(self.max_scale, (int, float)) or not self.max_scale > 0:
            raise ValueError(f"max_scale must be a number above 0, but got {self.max_scale!r}.")
        check_importance(self.importance)

    def _check_low_memory(self) -> None:
        """Raise if something needs the gradients of all terms at once."""
        needing = {
            f"anchor={self.anchor!r}": self.anchor in ("mean", "max"),
            "denominator='own'": self.denominator == "own",
            "on_nonfinite='skip'": self.on_nonfinite == "skip",
            "compile=True": self.compile,
            f"balance_every={self.balance_every}": self.balance_every > 1,
        }
        for option in [option for option, given in needing.items() if given]:
            raise ValueError(
                f"low_memory=True consumes each term's gradient as soon as it is there, but {option} needs those of all"
                " terms at once. Leave out one of the two."
            )

    def check_terms(self, terms: Sequence[str]) -> None:
        """Raise unless the anchor and the importances name ``terms``."""
        if SUM in terms:
            raise ValueError(f"No term can be called {SUM!r}: that is what messages call their sum. Rename it.")
        check_anchor(self.anchor, terms)
        check_importance(self.importance, terms)

    def refuse_with_low_memory(self, what: str) -> None:
        """Raise if gradients are consumed as soon as they are there, so that there can be no ``what``."""
        if self.low_memory:
            raise ValueError(
                f"low_memory=True consumes each term's gradient as soon as it is there, but {what} needs those of all"
                " terms at once. Leave out low_memory=True, or do without."
            )

    @property
    def fixes_squares(self) -> bool:
        """Whether second moments cannot follow what is made of the balanced gradient after ``backward``."""
        return self.denominator == "own" or (self.low_memory and self.denominator != "sum")

    @property
    def averages_squares(self) -> bool:
        """Whether squares of norms are averaged: where a scale lasts for many steps."""
        return self.balance_every > 1

    @property
    def shares_layers(self) -> bool:
        """Whether a layer may have several parameters."""
        return self.layers != "parameter"

    def moments(self, terms: int) -> tuple[int, int]:
        """How many first and second moments there are of each element."""
        return (terms if self.denominator == "own" else 1), (1 if self.denominator == "sum" else terms)

    @property
    def state_meaning(self) -> dict[str, str]:
        """The options that say what the numbers in the state mean: a checkpoint must agree on them."""
        layers = "callable" if callable(self.layers) else self.layers
        return {"layers": layers, "norm_init": self.norm_init, "denominator": self.denominator}


def check_group(group: Mapping[str, Any], options: Options, terms: tuple[str, ...]) -> None:
    """Raise unless a group's numbers are in range, its parameters real, and the optimizer's options left to it."""
    check_numbers(group)
    whole = {**dict.fromkeys(Options.__dataclass_fields__), **options.state_meaning, "terms": terms}
    for name, value in whole.items():
        if name in group and group[name] != value:
            raise ValueError(f"{name} holds for the whole optimizer: give it to MTAdam, not to a parameter group.")
    if any(parameter.is_complex() for parameter in group["params"]):
        raise TypeError("MTAdam has no complex parameters. Train torch.view_as_real(parameter) instead.")
    for index, parameter in enumerate(group["params"]):
        if not is_lazy(parameter) and overlaps(parameter):
            raise ValueError(
                f"Elements of parameter {index} of a group share memory: its shape is {tuple(parameter.shape)}, its"
                f" strides are {parameter.stride()}. No step can move them apart. Train a copy,"
                " torch.nn.Parameter(p.clone()), or what it was expanded from."
            )


def _check_choice(name: str, value: object, choices: Sequence[str], more: str = "") -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)} {more}".rstrip() + f", but got {value!r}.")
