"""Cuts parameters into blocks that fit the cache: small ones are joined, large ones are split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

BLOCK_ELEMENTS = {"cpu": 1 << 16}
"""Elements of a block per device type: on a CPU, some terms of it fit the cache."""
BLOCK_ELEMENTS_DEFAULT = 1 << 20


@dataclass(frozen=True)
class Block:
    """Whole parameters that follow each other, or a part of one.

    Attributes:
        first: the index of its first parameter.
        sizes: the number of elements that each of its parameters has in it.
        start: where it begins in its parameter, if it is a part; ``None`` if its parameters are whole.
    """

    first: int
    sizes: tuple[int, ...]
    start: int | None = None

    def members(self, of_all: Sequence[T]) -> Sequence[T]:
        """What belongs to its parameters, of what belongs to all."""
        return of_all[self.first : self.first + len(self.sizes)]

    def cut(self, members: Sequence[Tensor]) -> list[Tensor]:
        """What of its parameters' tensors lies in it, flat; views where the tensors are contiguous."""
        flat = [tensor.reshape(-1) for tensor in members]
        return flat if self.start is None else [flat[0][self.start : self.start + self.sizes[0]]]

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The pieces as one flat tensor: a view where there is but one, and it is contiguous."""
        pieces = self.cut(self.members(tensors))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def gather_rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """As ``gather``, of contiguous tensors with a leading dimension of the terms: [I, elements]."""
        rows = [tensor.reshape(len(tensor), tensor.numel() // len(tensor)) for tensor in self.members(tensors)]
        if self.start is not None:
            return rows[0][:, self.start : self.start + self.sizes[0]]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    def scatter(self, values: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write back what ``gather`` or ``gather_rows`` gave, unless it was a view."""
        members = self.members(tensors)
        if self.start is not None or (len(members) == 1 and members[0].is_contiguous()):
            return
        pieces = torch.split(values, list(self.sizes), -1)
        torch._foreach_copy_(
            list(members), [piece.view_as(member) for piece, member in zip(pieces, members, strict=True)]
        )

    def expand(self, values: Tensor) -> Tensor:
        """Spread one value per parameter over its elements: [..., P] -> [..., elements], or 1 for one parameter."""
        values = values[..., self.first : self.first + len(self.sizes)]
        if len(self.sizes) == 1:
            return values
        return values.repeat_interleave(_repeats(self.sizes, values.device), -1, output_size=sum(self.sizes))


def plan_blocks(parameters: Sequence[Tensor]) -> Iterator[Block]:
    """Cover parameters of one device, in their order, with blocks."""
    limit = BLOCK_ELEMENTS.get(parameters[0].device.type, BLOCK_ELEMENTS_DEFAULT)
    first, sizes = 0, list[int]()
    for index, parameter in enumerate(parameters):
        size = parameter.numel()
        if sizes and sum(sizes) + size > limit:
            yield Block(first, tuple(sizes))
            first, sizes = index, []
        if size > limit and parameter.is_contiguous():
            yield from (Block(index, (min(limit, size - start),), start) for start in range(0, size, limit))
            first = index + 1
        else:
            sizes.append(size)
    if sizes:
        yield Block(first, tuple(sizes))


@lru_cache(maxsize=4096)
def _repeats(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device)
