"""Flat memory that holds one gradient per term of every parameter, and where each parameter lies in it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mtadam.collect.norms import is_host
from lightning_mtadam.distributed.averaging import Averaging
from lightning_mtadam.terms import Gradients

PACKED = 2048  # parameters of up to this many elements lie beside others, so that one operation serves many
PACK = 1 << 16  # elements of a pack
ALIGNED = 256  # on an accelerator, parameters begin at multiples of it: elements of a block are all of one parameter


def pack_up(parameters: Sequence[Tensor], trained: Sequence[bool], keys: Sequence[Hashable | None]) -> list[list[int]]:
    """Which parameters lie side by side: packs of their indices. On the host a large one is a pack of its own.

    On an accelerator, which does not care for caches but for the number of its kernels, a pack is all of a kind.
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
        size, kind, host = parameter.numel(), (key, parameter.device, parameter.dtype), is_host(parameter.device)
        if key is None or (host and size > PACKED):
            packs.append([index])
            continue
        pack, filled = last.get(kind, ([], 0))
        if not pack or (host and filled + size > PACK):
            pack, filled = [], 0
            packs.append(pack)
        pack.append(index)
        last[kind] = pack, filled + size
    return packs


class Place(NamedTuple):
    """Where a parameter lies in flat memory.

    On an accelerator its elements are in the order of its own memory, if that has no gaps; on the host in that of their
    indices.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    block: int  # the elements of a block
    room: int  # the elements it takes there, in whole blocks

    @classmethod
    def of(cls, parameter: Tensor, block: int) -> Place:
        """The place of a parameter."""
        like = torch.empty_like(parameter, device="meta")
        if block == 1:  # then the order in which elements are added up, and so the last digit, is that of indices
            like = like.contiguous()
        return cls(parameter.shape, like.stride(), block, -(-parameter.numel() // block) * block)

    def view(self, flat: Tensor, begin: int) -> Tensor:
        """What lies there, [*shape]; or for rows, [R, elements], [R, *shape]."""
        rows = flat.shape[:-1], flat.stride()[:-1]
        return flat.as_strided((*rows[0], *self.shape), (*rows[1], *self.strides), flat.storage_offset() + begin)

    def suits(self, tensor: Tensor) -> bool:
        """Whether a tensor of this shape lies in memory so."""
        if tensor.stride() == self.strides:
            return True
        pairs = zip(self.shape, tensor.stride(), self.strides, strict=True)
        return not tensor.numel() or all(size == 1 or mine == theirs for size, mine, theirs in pairs)

    def flat(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of this shape: a view if it lies in memory so, else a copy."""
        if not self.suits(tensor):
            fresh = torch.empty_strided(self.shape, self.strides, dtype=tensor.dtype, device=tensor.device)
            tensor = fresh.copy_(tensor)
        return tensor.as_strided((tensor.numel(),), (1,))


def block_of(parameter: Tensor, key: Hashable | None) -> int:
    """The elements of a block: a sharded parameter, which has no key, lies as its process holds it."""
    return 1 if key is None or is_host(parameter.device) else ALIGNED


def places_of(parameters: Sequence[Tensor], key: Hashable | None) -> tuple[Place, ...]:
    """The places of the parameters of a pack, one after the other."""
    block = block_of(parameters[0], key)
    return tuple(Place.of(parameter, block) for parameter in parameters)


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
