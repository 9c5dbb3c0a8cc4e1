"""The gradients of each term between ``backward`` and ``step``."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.distributed import sharding
from lightning_mtadam.distributed.averaging import Averaging, FlatGradients
from lightning_mtadam.terms import TermGradients

ClipAlgorithm: TypeAlias = Literal["norm", "value"]
Gradients: TypeAlias = Sequence[Tensor | None]
Found: TypeAlias = Generator[tuple[str, list[Tensor | None]], None, None]


@dataclass
class PendingGradients:
    """What ``backward`` has collected and ``step`` has not yet consumed.

    Attributes:
        gradients: of every term, accumulated.
        clip: how the balanced gradient is to be clipped in the next step.
        skip: whether the next step is to do nothing.
        warned: whether it was said that a step was skipped.
        probed: whether ``torch.distributed.checkpoint`` has called ``step`` before the terms were known.
        buffers: memory for the gradients, kept from step to step: fresh memory for all terms at every step would cost
            more in page faults than the copy.
        flats: the same where gradients are averaged over processes; ``buffers`` are views into it.
    """

    gradients: TermGradients = field(default_factory=dict)
    clip: tuple[ClipAlgorithm, float] | None = None
    skip: bool = False
    warned: bool = False
    probed: bool = False
    buffers: dict[str, list[Tensor | None]] = field(default_factory=dict)
    flats: dict[str, FlatGradients] = field(default_factory=dict)

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
        averaging: Averaging | None = None,
        may_miss: bool = False,
    ) -> None:
        """Add the gradients of one more batch, and set ``p.grad`` to the sum over the terms.

        If a term fails, all that is pending is dropped.

        Args:
            found: the terms' gradients, as they come.
            names: their names, in that order.
            order: those and the names of what is pending, in the order in which they are averaged.
            parameters: the parameters they belong to.
            loss_scale: divides the terms' gradients, but not ``p.grad``.
            averaging: averages what has accumulated over the processes.
            may_miss: whether a term may reach no parameter now, as on one of several processes.

        Raises:
            ValueError: a term reaches no parameter.
        """
        try:
            gradients: TermGradients = {}
            for name in order:
                if name not in names:
                    gradients[name] = self.gradients[name]
                else:
                    _, new = next(found)
                    if not may_miss:
                        _check_reached(name, new)
                    gradients[name] = self._keep(name, new if loss_scale is None else divide(new, loss_scale))
                if averaging is not None:
                    averaging.send(name, gradients[name], self.flats[name])
            next(found, None)  # lets it clean up behind itself
            if averaging is not None:
                gradients = averaging.receive()
                for name in names:
                    _check_reached(name, gradients[name])
        except BaseException:
            found.close()  # lets it clean up now, not when the traceback is gone
            self.clear()
            self.flats.clear()  # a transfer may not have ended
            self.buffers.clear()
            raise
        total: list[Tensor | None] = [None] * len(parameters)
        for term in gradients.values():
            add_into(total, term)
        self.gradients, self.skip = gradients, False
        for parameter, gradient in zip(parameters, total, strict=True):
            if gradient is not None and loss_scale is not None:
                gradient.mul_(loss_scale)
            parameter.grad = None if gradient is None else sharding.like(gradient, parameter)

    def start_anew_if_reset(self, parameters: Sequence[Tensor]) -> None:
        """Drop what is pending if ``p.grad`` was reset behind the optimizer's back, as ``model.zero_grad()`` does."""
        if any(self.touched) and all(parameter.grad is None for parameter in parameters):
            self.gradients = {}

    def extend(self, count: int) -> None:
        """Note that there are more parameters, without gradients."""
        for gradients in (*self.gradients.values(), *self.buffers.values()):
            gradients += [None] * count

    def use_flat_memory(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        """Let the gradients of these terms be collected where they can travel from."""
        if not all(flat.fits(parameters) for flat in list(self.flats.values())[:1]):
            self.flats.clear()
        for name in names:
            if name not in self.flats:
                self.flats[name] = FlatGradients(parameters)
            self.buffers[name] = list(self.flats[name].views)

    def _keep(self, name: str, new: Gradients) -> list[Tensor | None]:
        """Add a term's gradients to what is pending, or copy them to memory of their own."""
        kept = list(self.gradients.get(name, [None] * len(new)))
        buffers = self.buffers.setdefault(name, [None] * len(new))
        copied, added = [], []
        for index, (old, gradient) in enumerate(zip(kept, new, strict=True)):
            if gradient is None:
                continue
            if old is not None:
                added.append((old, gradient))
                continue
            buffer = buffers[index]
            if buffer is None or not _alike(buffer, gradient):
                buffer = buffers[index] = torch.empty_like(gradient)
            kept[index] = buffer
            copied.append((buffer, gradient))
        if copied:
            torch._foreach_copy_([buffer for buffer, _ in copied], [gradient for _, gradient in copied])
        if added:
            torch._foreach_add_([old for old, _ in added], [gradient for _, gradient in added])
        return kept


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _check_reached(name: str, gradients: Gradients) -> None:
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            f"losses[{name!r}] reaches no parameter of the optimizer. Compute it from the output of the network that"
            " is trained, give the network's parameters to the optimizer, or leave the term out of the losses."
        )


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
    quotients = iter(torch._foreach_mul(present, divisor.reciprocal().to(present[0])) if present else ())
    return [None if gradient is None else next(quotients) for gradient in gradients]
