"""Flat memory that holds one gradient per term of every parameter, and where each parameter lies in it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam.distributed.averaging import Averaging
from lightning_mtadam.terms import Gradients

PACKED = 2048  # parameters of up to this many elements lie beside others, so that one operation serves many
PACK = 1 << 16  # elements of a pack


def pack_up(parameters: Sequence[Tensor], trained: Sequence[bool], keys: Sequence[Hashable | None]) -> list[list[int]]:
    """Which parameters lie side by side: packs of their indices. A large one is a pack of its own.

    ``trained``: per parameter, whether it is in a pack at all; ``keys``: what those in a pack share, ``None``: no pack.

    Example:
        >>> pack_up([torch.ones(3), torch.ones(50, 50), torch.ones(2)], [True] * 3, ["group"] * 3)
        [[0, 2], [1]]
    """
    packs: list[list[int]] = []
    last: dict[Hashable, tuple[list[int], int]] = {}  # the last pack of each kind, and its size
    for index, (parameter, flag, key) in enumerate(zip(parameters, trained, keys, strict=True)):
        if not flag:
            continue
        size, kind = parameter.numel(), (key, parameter.device, parameter.dtype)
        if key is None or size > PACKED:
            packs.append([index])
            continue
        pack, filled = last.get(kind, ([], 0))
        if not pack or filled + size > PACK:
            pack, filled = [], 0
            packs.append(pack)
        pack.append(index)
        last[kind] = pack, filled + size
    return packs


class GradientMemory:
    """Kept from step to step: fresh memory for all terms would cost more in page faults than the copy.

    ``rows``, [R, columns] for each device and dtype, hold R gradients of each of ``packs``, and can travel to other
    processes as they are; ``views`` [R][P] are of the parameters' ``shapes``, ``None`` where not ``trained``. The first
    ``active`` rows are in use: all, or one for a sum of the terms.
    """

    def __init__(
        self, parameters: Sequence[Tensor], trained: Sequence[bool], keys: Sequence[Hashable | None], count: int
    ) -> None:
        self.key: tuple[object, ...] = ()
        self.active, self.trained = count, list(trained)
        self.packs, self.shapes = pack_up(parameters, trained, keys), [parameter.shape for parameter in parameters]
        self._places: list[tuple[int, int, list[int]]] = []  # of each pack: in which rows, where, and its sizes
        widths: dict[tuple[torch.device, torch.dtype], int] = {}
        for pack in self.packs:
            kind = parameters[pack[0]].device, parameters[pack[0]].dtype
            sizes = [self.shapes[member].numel() for member in pack]
            begin = widths.setdefault(kind, 0)
            self._places.append((list(widths).index(kind), begin, sizes))
            widths[kind] += sum(sizes)
        self.rows = [torch.zeros(count, width, dtype=dtype, device=device) for (device, dtype), width in widths.items()]
        self.views = [self.shaped([rows[index] for rows in self.rows]) for index in range(count)]
        self._clean = [[True] * len(parameters) for _ in range(count)]  # whether a gradient's place holds zeros

    @classmethod
    def fitting(cls, kept: GradientMemory | None, parameters: Sequence[Tensor], *others: Any) -> GradientMemory:
        """The memory that was kept, if it was made for the same; else a new one."""
        key = [(one.shape, one.dtype, one.device) for one in parameters], *others
        if kept is None or kept.key != key:
            kept = cls(parameters, *others)
            kept.key = key
        return kept

    def send(self, row: int, gradients: Gradients, averaging: Averaging) -> None:
        """Let a row be averaged over the processes: zero where there is no gradient."""
        self.wrote(row, gradients)
        averaging.send([rows[row] for rows in self.rows], [gradient is not None for gradient in gradients])

    def use(self, count: int) -> GradientMemory:
        """Use the first rows only, e.g. one for a sum of the terms."""
        self.active = count
        return self

    def columns(self, pack: int) -> Tensor:
        """A pack's gradients, of all rows in use: [R, elements]."""
        which, begin, sizes = self._places[pack]
        return self.rows[which][: self.active, begin : begin + sum(sizes)]

    def shaped(self, flats: Sequence[Tensor]) -> list[Tensor | None]:
        """Views of the parameters' shapes into one flat tensor for each device and dtype."""
        views: list[Tensor | None] = [None] * len(self.shapes)
        for pack, (which, begin, sizes) in zip(self.packs, self._places, strict=True):
            pieces = torch.split(flats[which][begin : begin + sum(sizes)], sizes)
            for member, piece in zip(pack, pieces, strict=True):
                views[member] = piece.view(self.shapes[member])
        return views

    def wrote(self, row: int, gradients: Gradients | None) -> None:
        """Note which gradients of a row were written; the others become zero. ``None``: none was."""
        clean, views = self._clean[row], self.views[row]
        for index, gradient in enumerate(gradients or [None] * len(views)):
            view = views[index]
            if gradient is None and not clean[index] and view is not None:
                view.zero_()
            clean[index] = gradient is None
