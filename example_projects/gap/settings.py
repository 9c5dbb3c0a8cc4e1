"""A setting, as it is written on the command line: ``adam``, ``mtadam``, and options behind a colon."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Adam, Optimizer

from example_projects.problems.problem import Problem
from lightning_mtadam import MTAdam

BETAS = {"beta1": 0.9, "beta2": 0.999, "beta3": 0.9}


@dataclass(frozen=True)
class Setting:
    """An optimizer and its options.

    Attributes:
        name: as on the command line.
        optimizer: "adam", on a weighted sum of the losses, or "mtadam", on the losses as they are given.
        options: by name. ``beta1`` to ``beta3`` and MTAdam's own options. A term's name sets its weight, with MTAdam
            its importance. Adam has the balanced weights, but with ``weights=given`` the losses as they are given.
    """

    name: str
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def weights(self, problem: Problem, seed: int) -> Mapping[str, float]:
        """What the losses are multiplied by."""
        if self.optimizer == "mtadam" or self.options.get("weights") == "given":
            return problem.given_weights(seed)
        return {**problem.balanced_weights, **self._of_terms(problem)}

    def configure(self, problem: Problem, network: nn.Module, lr: float) -> Optimizer:
        """Make the optimizer."""
        betas = tuple(self.options.get(name, usual) for name, usual in BETAS.items())
        if self.optimizer == "adam":
            return Adam(network.parameters(), lr=lr, betas=betas[:2], fused=True)
        own = {"anchor": problem.anchor, **self.options}
        options = {name: value for name, value in own.items() if name not in (*BETAS, *problem.terms)}
        return MTAdam(
            network.named_parameters(),
            lr=lr,
            betas=betas,
            terms=problem.terms,
            importance=self._of_terms(problem),
            **options,
        )

    def _of_terms(self, problem: Problem) -> dict[str, float]:
        return {name: value for name, value in self.options.items() if name in problem.terms}


def read_setting(name: str) -> Setting:
    """Read a setting.

    Raises:
        ValueError: it is not written as ``adam`` or ``mtadam``, with options as ``:option=value,option=value``.

    Example:
        >>> read_setting("mtadam:denominator=sum,beta3=0.99").options
        {'denominator': 'sum', 'beta3': 0.99}
    """
    optimizer, _, options = name.partition(":")
    pairs = [option.partition("=") for option in options.split(",") if option]
    if optimizer not in ("adam", "mtadam") or not all(value for _, _, value in pairs):
        raise ValueError(f"A setting is written as mtadam:option=value,option=value, or adam, but got {name!r}.")
    return Setting(name, optimizer, {option: _value_of(text) for option, _, text in pairs})


def _value_of(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # "global" is a word of Python
        return text
