"""The gradients of each term between ``backward`` and ``step``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.terms import TermGradients

ClipAlgorithm: TypeAlias = Literal["norm", "value"]
Gradients: TypeAlias = Sequence[Tensor | None]
Found: TypeAlias = Iterator[tuple[str, list[Tensor | None]]]


@dataclass
class PendingGradients:
    """What ``backward`` has collected and ``step`` has not yet consumed."""

    gradients: TermGradients = field(default_factory=dict)
    clip: tuple[ClipAlgorithm, float] | None = None
    skip: bool = False

    def clear(self) -> None:
        """Forget everything."""
        self.gradients = {}
        self.clip = None
        self.skip = False

    @property
    def touched(self) -> list[bool]:
        """Whether any term has a gradient, per parameter."""
        columns = zip(*self.gradients.values(), strict=True)
        return [any(gradient is not None for gradient in column) for column in columns]

    def collect(
        self,
        found: Found,
        names: Sequence[str],
        order: Sequence[str],
        parameters: Sequence[Tensor],
        loss_scale: Tensor | None = None,
        average: Callable[[Found], Found] | None = None,
    ) -> None:
        """Add the gradients of one more batch, and set ``p.grad`` to the sum over the terms.

        Nothing is changed until every term is there.

        Args:
            found: the terms' gradients, as they come.
            names: their names, in that order.
            order: those and the names of what is pending, in the order in which they are averaged.
            parameters: the parameters they belong to.
            loss_scale: divides the terms' gradients, but not ``p.grad``.
            average: averages what has accumulated over the processes.

        Raises:
            ValueError: a term reaches no parameter.
        """
        accumulated = self._accumulate(found, names, order, loss_scale)
        gradients = dict(accumulated if average is None else average(accumulated))
        for name in names:
            _check_reached(name, gradients[name])
        total: list[Tensor | None] = [None] * len(parameters)
        for term in gradients.values():
            add_into(total, term)
        self.gradients, self.skip = gradients, False
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient if gradient is None or loss_scale is None else gradient.mul_(loss_scale)

    def start_anew_if_reset(self, parameters: Sequence[Tensor]) -> None:
        """Drop what is pending if ``p.grad`` was reset behind the optimizer's back, as ``model.zero_grad()`` does."""
        if all(parameter.grad is None for parameter in parameters):
            self.gradients = {}

    def extend(self, count: int) -> None:
        """Note that there are more parameters, without gradients."""
        self.gradients = {name: [*gradients, *[None] * count] for name, gradients in self.gradients.items()}

    def _accumulate(self, found: Found, names: Sequence[str], order: Sequence[str], loss_scale: Tensor | None) -> Found:
        for name in order:
            old = self.gradients.get(name)
            if name not in names:
                yield name, self.gradients[name]
                continue
            _, gradients = next(found)
            new = gradients if loss_scale is None else divide(gradients, loss_scale)
            yield name, new if old is None else add_gradients(old, new)


def _check_reached(name: str, gradients: Gradients) -> None:
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            f"losses[{name!r}] reaches no parameter of the optimizer. Compute it from the output of the network that"
            " is trained, give the network's parameters to the optimizer, or leave the term out of the losses."
        )


def add_gradients(old: Gradients, new: Gradients) -> list[Tensor | None]:
    """Add two lists entry by entry, out of place; ``None`` counts as zero."""
    total = [first if second is None else second for first, second in zip(old, new, strict=True)]
    both = [(index, a, b) for index, (a, b) in enumerate(zip(old, new, strict=True)) if a is not None and b is not None]
    if both:
        indices, first, second = zip(*both, strict=True)
        for index, value in zip(indices, torch._foreach_add(first, second), strict=True):
            total[index] = value
    return total


def add_into(total: list[Tensor | None], gradients: Gradients) -> None:
    """Add ``gradients`` to ``total`` in place; entries that are ``None`` there become copies."""
    both = [(a, b) for a, b in zip(total, gradients, strict=True) if a is not None and b is not None]
    if both:
        first, second = zip(*both, strict=True)
        torch._foreach_add_(first, second)
    for index, gradient in enumerate(gradients):
        if total[index] is None and gradient is not None:
            total[index] = gradient.clone()


def divide(gradients: Gradients, divisor: Tensor) -> list[Tensor | None]:
    """Divide every entry, out of place."""
    present = [gradient for gradient in gradients if gradient is not None]
    quotients = iter(torch._foreach_mul(present, divisor.to(present[0]).reciprocal()) if present else ())
    return [None if gradient is None else next(quotients) for gradient in gradients]
