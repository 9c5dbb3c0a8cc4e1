"""The gradients of each term between ``backward`` and ``step``."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.distributed import sharding
from lightning_mtadam.distributed.averaging import Averaging
from lightning_mtadam.optim.layout import TermMemory
from lightning_mtadam.optim.norms import norms_of
from lightning_mtadam.optim.schedule import SUM
from lightning_mtadam.terms import TermGradients

if TYPE_CHECKING:
    from lightning_mtadam.optim.streaming import Streaming

ClipAlgorithm: TypeAlias = Literal["norm", "value"]
Gradients: TypeAlias = Sequence[Tensor | None]
Found: TypeAlias = Generator[tuple[str, list[Tensor | None]], None, None]

CHUNK = 1 << 20
"""Elements that are copied before their norm is taken: they are then still in the cache."""


@dataclass
class PendingGradients:
    """What ``backward`` has collected and ``step`` has not yet consumed.

    Attributes:
        gradients: of every term, accumulated; views into the memory.
        terms: the names of the losses they come from.
        norms: of the gradients of those terms whose norms are known already, [P] each.
        memory: what holds the gradients; ``None`` before the first backward pass.
        streaming: what has consumed the gradients already, with ``low_memory``.
        clip: how the balanced gradient is to be clipped in the next step.
        skip: whether the next step is to do nothing.
        warned: whether it was said that a step was skipped.
        probed: whether ``torch.distributed.checkpoint`` has called ``step`` before the terms were known.
    """

    gradients: TermGradients = field(default_factory=dict)
    terms: tuple[str, ...] = ()
    norms: dict[str, list[Tensor | None]] = field(default_factory=dict)
    memory: TermMemory | None = None
    streaming: Streaming | None = None
    clip: tuple[ClipAlgorithm, float] | None = None
    skip: bool = False
    warned: bool = False
    probed: bool = False

    def clear(self) -> None:
        """Forget everything but the memory."""
        self.drop_gradients()
        self.clip = None
        self.skip = False

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        self.gradients, self.norms, self.terms = {}, {}, ()
        self.streaming = None

    @property
    def touched(self) -> list[bool]:
        """Whether any term has a gradient, per parameter."""
        columns = zip(*self.gradients.values(), strict=True)
        return [any(gradient is not None for gradient in column) for column in columns]

    @property
    def active(self) -> TermMemory:
        """The memory's rows that are in use: all, or the first for the sum alone."""
        assert self.memory is not None
        return self.memory.first_row if SUM in self.gradients else self.memory

    def use(self, memory: TermMemory, rows: Sequence[str]) -> None:
        """Collect into this memory, whose rows are these terms; what is pending moves there."""
        for name, gradients in self.gradients.items():
            views = memory.views[rows.index(name)]
            for index, (gradient, view) in enumerate(zip(gradients, views, strict=True)):
                if gradient is not None and view is not None and gradient is not view:
                    gradients[index] = view.copy_(gradient)
        self.memory = memory

    def collect(
        self,
        found: Found,
        names: Sequence[str],
        rows: Sequence[str],
        parameters: Sequence[Tensor],
        loss_scale: Tensor | None = None,
        averaging: Averaging | None = None,
        may_miss: bool = False,
    ) -> None:
        """Add the gradients of one more batch.

        If a term fails, all that is pending is dropped.

        Args:
            found: the terms' gradients, as they come.
            names: their names, in that order.
            rows: the terms that the memory's rows belong to, in the order in which they are averaged.
            parameters: the parameters they belong to.
            loss_scale: divides the gradients.
            averaging: averages what has accumulated over the processes.
            may_miss: whether a term may reach no parameter now, as on one of several processes.

        Raises:
            ValueError: a term reaches no parameter.
        """
        assert self.memory is not None
        memory = self.memory.first_row if SUM in names else self.memory
        try:
            gradients: TermGradients = {}
            for row, name in enumerate(rows):
                if name in names:
                    gradients[name] = self._keep(name, memory.views[row], found, loss_scale, may_miss)
                elif name in self.gradients:
                    gradients[name] = self.gradients[name]
                else:
                    continue
                if averaging is not None:
                    memory.wrote(row, [gradient is not None for gradient in gradients[name]])
                    averaging.send(name, gradients[name], memory, row)
            next(found, None)  # lets it clean up behind itself
            if averaging is not None:
                self.norms.clear()
                gradients = averaging.receive()
                for name in names:
                    check_reached(name, gradients[name])
        except BaseException:
            found.close()  # lets it clean up now, not when the traceback is gone
            self.clear()
            self.memory = None  # a transfer may not have ended
            raise
        self.gradients, self.skip = gradients, False
        for row, name in enumerate(rows):
            memory.wrote(row, [gradient is not None for gradient in gradients.get(name, [None] * len(parameters))])

    def start_anew_if_reset(self, parameters: Sequence[Tensor]) -> None:
        """Drop what is pending if ``p.grad`` was reset behind the optimizer's back, as ``model.zero_grad()`` does."""
        if (any(self.touched) or self.streaming is not None) and all(
            parameter.grad is None for parameter in parameters
        ):
            self.drop_gradients()

    def extend(self, count: int) -> None:
        """Note that there are more parameters, without gradients."""
        for gradients in (*self.gradients.values(), *self.norms.values()):
            gradients += [None] * count

    def _keep(
        self, name: str, views: Gradients, found: Found, loss_scale: Tensor | None, may_miss: bool
    ) -> list[Tensor | None]:
        """Take a term's next gradients and add them to what is pending, or copy them to the memory.

        What was found is let go before this returns: the next term's gradients need its place.
        """
        _, new = next(found)
        if not may_miss:
            check_reached(name, new)
        if loss_scale is not None:
            new = divide(new, loss_scale)
        kept = list(self.gradients.get(name, [None] * len(new)))
        norms = list(self.norms.get(name, [None] * len(new)))
        for chunk in _chunks(new):
            copied, added = [], []
            for index, gradient in chunk:
                old, view = kept[index], views[index]
                if old is not None:
                    added.append((old, gradient))
                elif view is not None:
                    copied.append((view, gradient))
                    kept[index] = view
            if added:
                torch._foreach_add_([old for old, _ in added], [gradient for _, gradient in added])
            if copied:
                torch._foreach_copy_([view for view, _ in copied], [gradient for _, gradient in copied])
            for (index, _), norm in zip(chunk, norms_of([kept[index] for index, _ in chunk]), strict=True):
                norms[index] = norm
        self.norms[name] = norms
        return kept

    def show_sum(self, parameters: Sequence[Tensor], loss_scale: Tensor | None) -> None:
        """Set ``p.grad`` to the sum over the terms, times the loss scale, for whoever looks at it."""
        assert self.memory is not None
        totals = [rows.sum(0) for rows in self.active.rows]
        if loss_scale is not None:
            totals = [total.mul_(loss_scale.to(total)) for total in totals]
        shaped = self.memory.shaped(totals)
        for parameter, total, touched in zip(parameters, shaped, self.touched, strict=True):
            parameter.grad = sharding.like(total, parameter) if touched and total is not None else None


def _chunks(gradients: Gradients) -> Iterator[list[tuple[int, Tensor]]]:
    """The gradients that are there, with their indices, some together."""
    chunk: list[tuple[int, Tensor]] = []
    size = 0
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        if chunk and size + gradient.numel() > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append((index, gradient))
        size += gradient.numel()
    if chunk:
        yield chunk


def check_reached(name: str, gradients: Gradients) -> None:
    """Raise unless there is any gradient."""
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            f"losses[{name!r}] reaches no parameter of the optimizer. Compute it from the output of the network that"
            " is trained, give the network's parameters to the optimizer, or leave the term out of the losses."
        )


def divide(gradients: Gradients, divisor: Tensor) -> list[Tensor | None]:
    """Divide every entry, out of place."""
    present = [gradient for gradient in gradients if gradient is not None]
    quotients = iter(torch._foreach_mul(present, divisor.reciprocal().to(present[0])) if present else ())
    return [None if gradient is None else next(quotients) for gradient in gradients]
