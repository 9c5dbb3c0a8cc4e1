"""The betas of the parameter groups, as tensors: another value is then no other program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Betas:
    """One beta of all groups.

    Attributes:
        value: of the first group, a float64 scalar on the host.
        others: every other value there is, with the rows [P, 1] it holds for.
    """

    value: Tensor
    others: tuple[tuple[Tensor, Tensor], ...] = ()

    def rows(self, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``compute`` gives for the beta of each parameter's group: [P, k]."""
        result = compute(self.value)
        for value, mine in self.others:
            result = compute(value).where(mine, result)
        return result


@dataclass(frozen=True)
class Decays:
    """The decays of a step.

    Attributes:
        first: beta1.
        second: beta2.
        norms: beta3, a scalar; or [L, 1] where groups differ.
    """

    first: Betas
    second: Betas
    norms: Tensor
