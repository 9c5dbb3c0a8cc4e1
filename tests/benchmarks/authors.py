"""MTAdam as its authors wrote it (github.com/ItzikMalkiel/MTAdam), from the description: what we are measured against.

A loop over terms and, within, over parameters; two moments per term, and the denominators kept beside them. Left out
is what does not concern the cost: parameter groups, amsgrad, weight decay, and that a term which misses a parameter
ends the loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_NORM = 1e-10


@dataclass
class Moments:
    """What is kept per parameter: I tensors of each kind."""

    first: list[Tensor]
    second: list[Tensor]
    denominators: list[Tensor | None]
    norms: list[Tensor | None]


class AuthorsMTAdam:
    """The authors' algorithm.

    Args:
        parameters: what is trained.
        terms: the number of losses.
        lr: learning rate.
        betas: decay of the first moments, the second moments, and the gradient norms.
        eps: added to the denominators.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        terms: int,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
        eps: float = 1e-8,
    ) -> None:
        self.parameters, self.terms = list(parameters), terms
        self.lr, self.betas, self.eps = lr, betas, eps
        self.clock = 0
        self.kept: dict[Tensor, Moments] = {}

    def step(self, losses: Sequence[Tensor]) -> None:
        """Differentiate the losses one by one, and move the parameters."""
        self.clock += 1
        for term, loss in enumerate(losses):
            loss.backward(retain_graph=True)  # also the last one, as they do
            self.consume(term)
        self.move()

    @torch.no_grad()
    def consume(self, term: int) -> None:
        """Balance a term's gradients, ``p.grad``, and update its moments."""
        beta1, beta2, beta3 = self.betas
        for p in self.parameters:
            if p.grad is None:
                continue
            kept = self._kept(p)
            norm, before = torch.norm(p.grad), kept.norms[term]
            kept.norms[term] = norm if before is None else before * beta3 + (1 - beta3) * norm
            gradient = self._balanced(p.grad, kept.norms, term)
            kept.first[term].mul_(beta1).add_(gradient, alpha=1 - beta1)
            kept.second[term].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            correction = math.sqrt(1 - beta2**self.clock)
            kept.denominators[term] = (kept.second[term].sqrt() / correction).add_(self.eps)
            p.grad = gradient.detach_().zero_()

    @torch.no_grad()
    def move(self) -> None:
        """Every term's step over the largest denominator."""
        size = self.lr / (1 - self.betas[0] ** self.clock)
        for p, kept in self.kept.items():
            largest = kept.denominators[0]
            for denominator in kept.denominators[1:]:
                largest = torch.max(largest, denominator)
            total = 0
            for first in kept.first:
                total = total + -size * (first / largest)
            p.add_(total)

    def _kept(self, p: Tensor) -> Moments:
        if p not in self.kept:
            self.kept[p] = Moments(
                [torch.zeros_like(p) for _ in range(self.terms)],
                [torch.zeros_like(p) for _ in range(self.terms)],
                [None] * self.terms,
                [None] * self.terms,
            )
        return self.kept[p]

    def _balanced(self, gradient: Tensor, norms: Sequence[Tensor | None], term: int) -> Tensor:
        """Bring the gradient to the first term's magnitude that is not zero."""
        if not norms[term] > SMALLEST_NORM:
            return gradient
        anchor = next(norm for norm in norms if norm > SMALLEST_NORM)
        return 1.0 * anchor * gradient / norms[term]
