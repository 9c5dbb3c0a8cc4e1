"""Flat memory that holds one gradient per term of every parameter."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam.distributed.averaging import Averaging
from lightning_mtadam.layout import Place, pack_up, places_of
from lightning_mtadam.terms import Gradients


class GradientMemory:
    """Kept from step to step: fresh memory for all terms would cost more in page faults than the copy.

    ``rows``, [R, columns] for each device and dtype, hold R gradients of each of ``packs``, and can travel to other
    processes as they are, unless packs lie ``apart``, each in memory of its own; ``views`` [R][P] are of the
    parameters' shapes, ``None`` where not ``trained``. The first ``active`` rows are in use: all, or one for a sum of
    the terms.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        trained: Sequence[bool],
        keys: Sequence[Hashable | None],
        count: int,
        apart: bool = False,
    ) -> None:
        self.key: tuple[object, ...] = ()
        self.active, self.trained = count, list(trained)
        self.packs = pack_up(parameters, trained, keys)
        self.places: list[tuple[Place, ...]] = []  # of each pack's parameters
        self._bounds: list[tuple[int, int, int]] = []  # of each pack: in which rows, from where to where
        widths: dict[tuple[torch.device, torch.dtype, int], int] = {}
        for index, pack in enumerate(self.packs):
            kind = parameters[pack[0]].device, parameters[pack[0]].dtype, index if apart else 0
            self.places.append(places_of([parameters[member] for member in pack], keys[pack[0]]))
            begin = widths.setdefault(kind, 0)
            widths[kind] += sum(place.room for place in self.places[-1])
            self._bounds.append((list(widths).index(kind), begin, widths[kind]))
        kinds = widths.items()
        self.rows = [torch.zeros(count, width, dtype=dtype, device=device) for (device, dtype, _), width in kinds]
        self.views = [self.shaped([rows[index] for rows in self.rows]) for index in range(count)]
        self._clean = [[True] * len(parameters) for _ in range(count)]  # whether a gradient's place holds zeros
        self.used_up = False  # whether the first row has served for results: then it holds anything

    @classmethod
    def fitting(cls, kept: GradientMemory | None, parameters: Sequence[Tensor], *others: Any) -> GradientMemory:
        """The memory that was kept, if it was made for the same; else a new one."""
        key = [(one.shape, one.stride(), one.dtype, one.device) for one in parameters], *others
        if kept is None or kept.key != key:
            kept = cls(parameters, *others)
            kept.key = key
        return kept

    def beside(self) -> GradientMemory:
        """Fresh memory for one gradient of each parameter, where all lies as here."""
        made = copy(self)
        made.rows, made.active = [torch.empty_like(rows[:1]) for rows in self.rows], 1
        made.views = [made.shaped([rows[0] for rows in made.rows])]
        return made

    def send(self, row: int, gradients: Gradients, averaging: Averaging) -> None:
        """Let a row be averaged over the processes: zero where there is no gradient."""
        self.wrote(row, gradients)
        averaging.send([rows[row] for rows in self.rows], [gradient is not None for gradient in gradients])

    def use(self, count: int) -> GradientMemory:
        """Use the first rows only, e.g. one for a sum of the terms."""
        self.active = count
        if self.used_up:
            for rows in self.rows:
                rows[0].zero_()
            self._clean[0], self.used_up = [True] * len(self.trained), False
        return self

    def columns(self, pack: int) -> Tensor:
        """A pack's gradients, of all rows in use: [R, elements]."""
        which, begin, end = self._bounds[pack]
        return self.rows[which][: self.active, begin:end]

    def shaped(self, flats: Sequence[Tensor]) -> list[Tensor | None]:
        """Views of the parameters' shapes into one flat tensor for each device and dtype."""
        views: list[Tensor | None] = [None] * len(self.trained)
        for pack, places, (which, start, _) in zip(self.packs, self.places, self._bounds, strict=True):
            for member, place in zip(pack, places, strict=True):
                views[member] = place.view(flats[which], start)
                start += place.room
        return views

    def wrote(self, row: int, gradients: Gradients | None) -> None:
        """Note which gradients of a row were written; the others become zero. ``None``: none was."""
        clean, views, spoiled = self._clean[row], self.views[row], list[Tensor]()
        for index, gradient in enumerate(gradients or [None] * len(views)):
            view = views[index]
            if gradient is None and not clean[index] and view is not None:
                spoiled.append(view)
            clean[index] = gradient is None
        if spoiled:
            torch._foreach_zero_(spoiled)
