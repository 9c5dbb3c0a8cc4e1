"""The gradients of each term between ``backward`` and ``step``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import is_, or_
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam.balancing import wide_dtype
from lightning_mtadam.collect.batch import Batch
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.distributed import sharding
from lightning_mtadam.layout import runs_of
from lightning_mtadam.terms import Found, Gradients, TermGradients, check_reached


@dataclass
class PendingGradients:
    """What ``backward`` has collected and ``step`` has not yet consumed."""

    gradients: TermGradients = field(default_factory=dict)  # of every term, accumulated; views into the memory
    terms: tuple[str, ...] = ()  # the names of the losses they come from
    norms: dict[str, list[Tensor | None]] = field(default_factory=dict)  # of the terms whose norms are known, [P] each
    memory: GradientMemory | None = None  # what holds the gradients; None before the first backward pass
    light: bool = False  # whether they are of one weighted sum of the losses, as in most steps with balance_every
    awaited: dict[str, int] = field(default_factory=dict)  # the terms that came too late to be measured, and until when
    shown: Any = None  # the balanced gradient as it is in p.grad
    absorbed: Any = None  # what has consumed the gradients already, with low_memory
    skip: bool = False  # whether the next step is to do nothing
    seen: set[str] = field(default_factory=set)  # the terms whose graphs were looked at
    probed: bool = False  # whether torch.distributed.checkpoint has called step before the terms were known

    def clear(self) -> None:
        """Forget everything but the memory."""
        self.drop_gradients()
        self.skip = False

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        self.gradients, self.norms, self.terms, self.awaited = {}, {}, (), {}
        self.light, self.absorbed, self.shown = False, None, None

    @property
    def touched(self) -> list[bool]:
        """Whether any term has a gradient, per parameter; empty if nothing is pending."""
        columns = zip(*self.gradients.values(), strict=True)
        return [not all(map(is_, column, repeat(None))) for column in columns]

    def fitting(self, batch: Batch, groups: Sequence[Mapping[str, Any]], rows: int) -> GradientMemory:
        """The memory that is there, if it fits: for so many gradients of each parameter of an optimizer's groups."""
        parameters, sharded = batch.parameters, batch.processes.sharded
        parts = list(map(sharding.local, parameters)) if sharded else parameters
        keys = [None if sharded else id(group) for group in groups for _ in group["params"]]
        trained = [one.requires_grad for one in parameters]
        trained = list(map(or_, trained, self.touched)) if self.gradients else trained  # frozen since
        return GradientMemory.fitting(self.memory, parts, trained, keys, rows)

    def use(self, memory: GradientMemory, rows: Sequence[str]) -> None:
        """Collect into this memory, whose rows are these terms; what is pending moves there."""
        if memory is not self.memory:
            for name, gradients in self.gradients.items():
                for index, view in enumerate(memory.views[rows.index(name)]):
                    gradient = gradients[index]
                    if gradient is not None and view is not None:
                        gradients[index] = view.copy_(gradient)
        self.memory = memory

    def add(self, batch: Batch, rows: Sequence[str]) -> None:
        """Differentiate and add one more batch; if a term fails, drop all. ``rows``: the terms of the memory's rows."""
        memory, found, averaging = self.memory, batch.gradients(), batch.averaging
        assert memory is not None
        gradients: TermGradients = {}
        try:
            for row, name in enumerate(rows):
                if name in batch.losses:
                    gradients[name] = self._keep(name, memory.views[row], found, batch)
                elif name in self.gradients:
                    gradients[name] = self.gradients[name]
                else:
                    continue
                if averaging is not None:
                    memory.send(row, gradients[name], averaging)
            next(found, None)  # lets it clean up behind itself
            if averaging is not None:
                self.norms.clear()
                for name, flags in zip(gradients, averaging.receive(), strict=True):
                    views = memory.views[rows.index(name)]
                    gradients[name] = [view if flag else None for view, flag in zip(views, flags, strict=True)]
                for name in batch.losses:
                    if name in averaging.absent and name not in self.gradients:
                        del gradients[name]
                    else:
                        check_reached(name, gradients[name])
        except BaseException:
            found.close()  # lets it clean up now, not when the traceback is gone
            self.clear()
            self.memory = None  # a transfer may not have ended
            raise
        self.gradients, self.skip = gradients, False
        for row, name in enumerate(rows):
            memory.wrote(row, gradients.get(name))

    def extend(self, count: int) -> None:
        """Note that there are more parameters, without gradients."""
        for gradients in (*self.gradients.values(), *self.norms.values()):
            gradients += [None] * count

    def _keep(self, name: str, views: Gradients, found: Found, batch: Batch) -> list[Tensor | None]:
        """Take a term's next gradients, and add them to what is pending or copy them to the memory, ``views``.

        What was found is let go before this returns: the next term's gradients need its place.
        """
        new, old = next_gradients(found, name, batch), self.gradients.get(name)
        kept: list[Tensor | None] = [None] * len(new) if old is None else old
        norms = self.norms.setdefault(name, [None] * len(new))
        for indices in runs_of(new, views):
            targets, gradients = list[Tensor](), list[Tensor]()
            for index in indices:
                view, gradient = views[index], new[index]
                assert view is not None
                assert gradient is not None
                kept[index] = view  # which holds zeros, where the term did not reach before
                targets.append(view)
                gradients.append(gradient)
            (torch._foreach_copy_ if old is None else torch._foreach_add_)(targets, gradients)
            if batch.averaging is None:  # else those of the averages will count
                found_norms = torch._foreach_norm(targets, 2.0, dtype=wide_dtype(targets))
                for index, norm in zip(indices, found_norms, strict=True):
                    norms[index] = norm
        return kept


def next_gradients(found: Found, name: str, batch: Batch) -> list[Tensor | None]:
    """A term's gradients, without the loss scale; ``ValueError`` if there are none, unless others may have some."""
    _, gradients = next(found)
    if not batch.replicated:
        check_reached(name, gradients)
    if batch.loss_scale is None:
        return gradients
    factor, divided = batch.loss_scale.reciprocal(), list(gradients)
    for device in {gradient.device for gradient in gradients if gradient is not None}:
        here = [at for at, one in enumerate(gradients) if one is not None and one.device == device]
        mine = [one for one in gradients if one is not None and one.device == device]
        for at, one in zip(here, torch._foreach_mul(mine, factor.to(mine[0])), strict=True):
            divided[at] = one
    return divided
