"""A setting, as it is written on the command line: ``adam``, ``mtadam``, and options behind a colon."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Adam, Optimizer

from example_projects.gap.anchors import AnchorSchedule, read_anchor
from example_projects.gap.beta2_per_term import Beta2PerTerm
from example_projects.gap.memory import Memory, fallen, fixed
from example_projects.problems.problem import Problem
from lightning_mtadam import MTAdam

BETAS = {"beta1": 0.9, "beta2": 0.999, "beta3": 0.9}
OF_A_TERM = "beta2."  # and its name


@dataclass(frozen=True)
class Setting:
    """An optimizer and its options.

    Attributes:
        name: as on the command line.
        optimizer: "adam", on a weighted sum of the losses, or "mtadam", on the losses as they are given.
        options: by name. ``beta1`` to ``beta3`` and MTAdam's own options. A term's name sets its weight, with MTAdam
            its importance. Adam has the balanced weights, but with ``weights=given`` the losses as they are given.
            MTAdam's ``anchor`` may be two with a change of them, ``max-mean@0.5``. It has a beta2 for each term if
            ``beta2`` is "fallen", or with ``beta2.<term>``.
    """

    name: str
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def weights(self, problem: Problem, seed: int) -> Mapping[str, float]:
        """What the losses are multiplied by."""
        if self.optimizer == "mtadam" or self.options.get("weights") == "given":
            return problem.given_weights(seed)
        return {**problem.balanced_weights, **self._of_terms(problem)}

    def anchors(self, problem: Problem) -> AnchorSchedule:
        """MTAdam's anchor, and when it changes."""
        return read_anchor(self.options.get("anchor", problem.anchor))

    def configure(self, problem: Problem, network: nn.Module, lr: float, *, late: bool = False) -> Optimizer:
        """Make the optimizer, with its early anchor or with its late one."""
        betas = tuple(self.options.get(name, usual) for name, usual in BETAS.items())
        if self.optimizer == "adam":
            return Adam(network.parameters(), lr=lr, betas=betas[:2], fused=True)
        anchors = self.anchors(problem)
        named = {name: value for name, value in self.options.items() if name not in (*BETAS, *problem.terms, "anchor")}
        options = {
            **{name: value for name, value in named.items() if not name.startswith(OF_A_TERM)},
            "terms": problem.terms,
            "importance": self._of_terms(problem),
            "anchor": anchors.late if late else anchors.early,
        }
        memory = self._memory(problem)
        if memory is not None:
            return Beta2PerTerm(network.parameters(), lr, memory, betas=(betas[0], betas[2]), **options)
        return MTAdam(network.named_parameters(), lr=lr, betas=betas, **options)

    def _of_terms(self, problem: Problem) -> dict[str, float]:
        return {name: value for name, value in self.options.items() if name in problem.terms}

    def _memory(self, problem: Problem) -> Memory | None:
        """What chooses beta2 for each term; ``None`` if all have the same."""
        beta2 = self.options.get("beta2", BETAS["beta2"])
        if beta2 == "fallen":
            return fallen(BETAS["beta2"])
        if not any(name.startswith(OF_A_TERM) for name in self.options):
            return None
        return fixed([self.options.get(f"{OF_A_TERM}{term}", beta2) for term in problem.terms])


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
