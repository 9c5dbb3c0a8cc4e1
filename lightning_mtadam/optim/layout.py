"""Where parameters lie in the flat memory that holds the gradients of their terms, and the blocks a step works on.

Large parameters are cut into blocks that fit the cache; small ones that share a group are packed side by side, so that
one operation serves many.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

PACKED = 2048
"""Parameters of up to this many elements are packed with others."""
PACK = 1 << 16
"""Elements of a pack."""
BLOCK = 1 << 19
"""Elements of a block, over all terms: on a CPU, what the cache of one core and its share of the common one hold."""


@dataclass(frozen=True)
class Span:
    """One large parameter, or a pack of small ones that lie side by side.

    Attributes:
        members: the indices of its parameters.
        bounds: where they begin in it, and where the last ends.
        memory: in which memory it lies, of those there are by device and dtype.
        start: its first column there.
    """

    members: tuple[int, ...]
    bounds: tuple[int, ...]
    memory: int
    start: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.bounds[-1]

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each of its members."""
        return [end - begin for begin, end in pairwise(self.bounds)]

    def runs(self, wanted: Sequence[bool], limit: int) -> Iterator[Block]:
        """Blocks over those members that are wanted; a large parameter is cut into pieces of ``limit`` elements."""
        if len(self.members) == 1:
            if wanted[self.members[0]]:
                for begin in range(0, self.size, limit):
                    yield Block(self, 0, 1, begin, min(begin + limit, self.size))
            return
        first = 0
        for last in range(len(self.members) + 1):
            if last == len(self.members) or not wanted[self.members[last]]:
                if last > first:
                    yield Block(self, first, last, self.bounds[first], self.bounds[last])
                first = last + 1


@dataclass(frozen=True)
class Block:
    """Members of a pack that follow each other, or a piece of a large parameter.

    Attributes:
        span: what it is a part of.
        first, last: its members, counted in the span.
        begin, end: its elements, counted in the span.
    """

    span: Span
    first: int
    last: int
    begin: int
    end: int

    @property
    def members(self) -> tuple[int, ...]:
        """The indices of its parameters."""
        return self.span.members[self.first : self.last]

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each of its members in it."""
        if self.last - self.first == 1:
            return [self.end - self.begin]
        return self.span.sizes[self.first : self.last]


def lay_out(parameters: Sequence[Tensor], keys: Sequence[Hashable | None]) -> list[Span]:
    """Give every parameter its place.

    Args:
        parameters: the parameters, or this process's parts of them.
        keys: per parameter what it must share with those it is packed with; ``None`` if it is never packed.
    """
    memories: dict[tuple[torch.device, torch.dtype], int] = {}
    packs: dict[Hashable, tuple[list[int], int]] = {}  # the last of each kind, and its size
    spans: list[list[int]] = []
    for index, (parameter, key) in enumerate(zip(parameters, keys, strict=True)):
        memories.setdefault((parameter.device, parameter.dtype), len(memories))
        if key is None or parameter.numel() > PACKED:
            spans.append([index])
            continue
        kind = (key, parameter.device, parameter.dtype)
        pack, size = packs.get(kind, ([], 0))
        if size + parameter.numel() > PACK:
            pack, size = [], 0
        if not pack:
            spans.append(pack)
        pack.append(index)
        packs[kind] = pack, size + parameter.numel()
    widths = [0] * len(memories)
    placed = list[Span]()
    for members in spans:
        first = parameters[members[0]]
        memory = memories[first.device, first.dtype]
        bounds = [0]
        for member in members:
            bounds.append(bounds[-1] + parameters[member].numel())
        placed.append(Span(tuple(members), tuple(bounds), memory, widths[memory]))
        widths[memory] += bounds[-1]
    return placed


def place(parameters: Sequence[Tensor], trained: Sequence[bool], keys: Sequence[Hashable | None]) -> list[Span]:
    """As ``lay_out``, of those parameters that are trained; their indices are those among all."""
    chosen = [index for index, flag in enumerate(trained) if flag]
    spans = lay_out([parameters[index] for index in chosen], [keys[index] for index in chosen])
    return [replace(span, members=tuple(chosen[member] for member in span.members)) for span in spans]


class TermMemory:
    """Flat memory for one gradient per term of every parameter, kept from step to step.

    Fresh memory for all terms at every step would cost more in page faults than the copy; and a row can travel to other
    processes as it is.

    Args:
        parameters: the parameters, or this process's parts of them.
        trained: per parameter, whether it gets memory.
        keys: as of ``lay_out``.
        count: R rows: one for each term.

    Attributes:
        spans: the places of those that are trained.
        rows: [R, columns] for each device and dtype.
        views: [R][P], of the parameters' shapes; ``None`` where not trained.
        clean: [R][P], whether the gradient's place holds zeros.
    """

    def __init__(
        self, parameters: Sequence[Tensor], trained: Sequence[bool], keys: Sequence[Hashable | None], count: int
    ) -> None:
        self.parameters, self.trained, self.keys, self.count = list(parameters), list(trained), list(keys), count
        self.spans = place(parameters, trained, keys)
        self.rows: list[Tensor] = []
        for memory in range(1 + max((span.memory for span in self.spans), default=-1)):
            mine = [span for span in self.spans if span.memory == memory]
            like = parameters[mine[0].members[0]]
            self.rows.append(torch.zeros(count, sum(span.size for span in mine), dtype=like.dtype, device=like.device))
        self.views: list[list[Tensor | None]] = [
            self.shaped([row[index] for row in self.rows]) for index in range(count)
        ]
        self.clean = [[True] * len(self.parameters) for _ in range(count)]

    def fits(
        self, parameters: Sequence[Tensor], trained: Sequence[bool], keys: Sequence[Hashable | None], count: int
    ) -> bool:
        """Whether it was made for these."""
        return (
            (self.trained, self.keys, self.count) == (trained, keys, count)
            and len(self.parameters) == len(parameters)
            and all(
                mine is other or (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)
                for mine, other in zip(self.parameters, parameters, strict=True)
            )
        )

    def shaped(self, flats: Sequence[Tensor]) -> list[Tensor | None]:
        """Views of the parameters' shapes into one flat tensor for each memory."""
        views: list[Tensor | None] = [None] * len(self.parameters)
        for span in self.spans:
            flat = flats[span.memory][span.start : span.start + span.size]
            for member, piece in zip(span.members, torch.split(flat, span.sizes), strict=True):
                views[member] = piece.view(self.parameters[member].shape)
        return views

    def columns(self, block: Block) -> Tensor:
        """The block of all terms: [R, elements]."""
        start = block.span.start
        return self.rows[block.span.memory][:, start + block.begin : start + block.end]

    def wrote(self, row: int, reached: Sequence[bool]) -> None:
        """Note which gradients of a row were written; the others become zero."""
        stale = [
            view
            for view, clean, now in zip(self.views[row], self.clean[row], reached, strict=True)
            if view is not None and not now and not clean
        ]
        if stale:
            torch._foreach_zero_(stale)
        self.clean[row][:] = [not now for now in reached]

    @cached_property
    def first_row(self) -> TermMemory:
        """The same memory, seen as that of one term."""
        only = copy(self)
        only.count, only.rows, only.views = 1, [rows[:1] for rows in self.rows], self.views[:1]
        only.clean = self.clean[:1]
        return only


def fitting(
    memory: TermMemory | None,
    parameters: Sequence[Tensor],
    trained: Sequence[bool],
    keys: Sequence[Hashable | None],
    count: int,
) -> TermMemory:
    """The memory that is there, if it was made for these; else a new one. The arguments are those of ``TermMemory``."""
    if memory is not None and memory.fits(parameters, trained, keys, count):
        return memory
    return TermMemory(parameters, trained, keys, count)
