"""The weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.balancers.importance import WeighsTerms
from lightning_mtadam.terms import plain


class FixedWeights(WeighsTerms):
    """The weighted sum of the losses, with constant weights.

    Args:
        weights: by term; the terms are those that have one. What ``set_importance`` gives multiplies them.

    Raises:
        ValueError: no weights, or one that is inf or nan.

    Example:
        >>> from torch import nn
        >>> w = nn.Parameter(torch.tensor(2.0))
        >>> model = nn.ParameterList([w])
        >>> balancer = FixedWeights({"fit": 1.0, "decay": 0.1})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> balancer.backward({"fit": (w - 1).square(), "decay": w.square()}, optimizer, model=model)
        tensor(1.4000)
        >>> w.grad
        tensor(2.4000)
    """

    works_on_shards: ClassVar[bool] = True
    has_objective: ClassVar[bool] = True

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        weights = plain(weights)
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"weights[{name!r}] must be finite, but is {weight!r}.")
        self.weights = {name: float(weight) for name, weight in weights.items()}

    def term_weights(self) -> dict[str, Tensor]:
        """The weights, times the importance of each term."""
        return {name: torch.tensor(now, device="cpu") for name, now in zip(self._terms, self._now(), strict=True)}

    def balance(self, batch: Batch) -> Tensor:
        """As of every balancer."""
        return batch.run_weighted(self._now()).sum()

    def _now(self) -> list[float]:
        importance = self.importance_of(self._terms)
        return [self.weights[name] * factor for name, factor in zip(self._terms, importance, strict=True)]
