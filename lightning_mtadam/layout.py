"""Where parameters lie in flat memory: in packs, one after the other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mtadam.terms import Gradients, is_host

PACKED = 2048  # parameters of up to this many elements lie beside others, so that one operation serves many
PACK = 1 << 16  # elements of a pack
CACHED = 1 << 20  # elements that are copied before their norm is taken: they are then still in the cache
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


def overlaps(parameter: Tensor) -> bool:
    """Whether two of its elements lie in one place."""
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size > 1 and stride <= reach:
            return parameter.numel() > 0
        reach += (size - 1) * stride
    return False


def own_memory(tensor: Tensor) -> Tensor:
    """A contiguous copy if it shares its memory with others; what is saved or kept is then its own alone."""
    if hasattr(tensor, "to_local") or tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def runs_of(gradients: Gradients, views: Gradients) -> list[list[int]]:
    """The indices of the gradients that are there, of some together.

    On the host so many as its cache holds. On an accelerator all that one kernel can take: those of one kind that lie
    in memory like their views.
    """
    pieces: dict[Hashable, list[int]] = {}
    size = number = 0
    for index, (gradient, view) in enumerate(zip(gradients, views, strict=True)):
        if gradient is None or view is None:
            continue
        kind: Hashable = gradient.device, gradient.dtype, gradient.stride() == view.stride()
        if gradient.device.type == "cpu":
            size += gradient.numel()
            if size > CACHED:
                number, size = number + 1, gradient.numel()
            kind = number
        pieces.setdefault(kind, []).append(index)
    return list(pieces.values())
