"""The runs of elements that a step works on.

On the host large parameters are cut, and small ones of a group lie side by side; on an accelerator a chunk is all of a
group, in blocks that each belong to one parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lightning_mtadam.balancing import wide_dtype
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.distributed import sharding
from lightning_mtadam.layout import Place
from lightning_mtadam.optim.options import Denominator
from lightning_mtadam.terms import is_host


class Numbers(NamedTuple):
    """What a parameter group says, and what holds for all groups; compiled, scalar tensors in place of floats."""

    lr: Any  # negative to maximize
    share: Any  # 1 - beta1
    eps: Any
    decay: Any  # 1 - lr * weight_decay; None without weight decay
    denominator: Denominator
    no_eps: bool  # whether eps is zero
    skipped: Tensor | None  # a boolean scalar: where it is true nothing may change; None: it is known to be false

    @classmethod
    def of(cls, group: Mapping[str, Any], denominator: Denominator, skipped: Tensor | None) -> Any:
        """The numbers of a group as they are now."""
        lr, eps = float(group["lr"]), float(group["eps"])
        decay = 1 - lr * float(group["weight_decay"]) if group["weight_decay"] else None
        share = 1 - float(group["betas"][0])
        return cls(-lr if group["maximize"] else lr, share, eps, decay, denominator, eps == 0, skipped)


class Coefficients(NamedTuple):
    """What differs between layers and terms: [I, b] of a chunk, or [I, 1]; of all parameters together [P, I]."""

    scales: Tensor | None  # importance_i n_anchor / n_i   (Alg. 1, line 8); None with denominator "sum"
    weights: Tensor  # of V second moments, (1 - beta2) / (1 - beta2^t); zero where the term has not reached
    factor: Tensor  # one, or one per term with "own": (1 - beta1^t) / V, times the terms that reach with update="mean"
    reaching: Tensor | None  # one: the number of terms that reach, at least 1; with denominator "mean" only
    correction: Tensor | None  # of V second moments, 1 - beta2^t, which amsgrad takes out again; only there


class Moments(NamedTuple):
    """Rows [b] each, updated in place. ``first`` averages the balanced gradient over V; with "own" one per term."""

    first: Sequence[Tensor]
    second: Sequence[Tensor]
    largest: Sequence[Tensor] = ()  # with amsgrad

    def widened(self, dtype: torch.dtype) -> Moments:
        """In the dtype of the arithmetic: copies, or the rows themselves."""
        narrow = any([rows[0].dtype != dtype for rows in self if rows])  # noqa: C419 - a generator cannot be compiled
        return Moments(*[[row.to(dtype) for row in rows] for rows in self]) if narrow else self

    def keep(self, wide: Moments) -> None:
        """Write back what ``widened`` gave. A narrow dtype saturates: an average that is infinite would never decay."""
        if wide is not self:
            for rows, values in zip(self, wide, strict=True):
                for row, value in zip(rows, values, strict=True):
                    row.copy_(value.clamp(-torch.finfo(row.dtype).max, torch.finfo(row.dtype).max))


@dataclass(frozen=True)
class Chunk:
    """Elements that lie side by side: of one parameter, a piece of it, or several of one group."""

    members: tuple[int, ...]  # the indices of its parameters
    parameters: tuple[Tensor, ...]  # they themselves; they may be sharded
    places: tuple[Place, ...]  # where they lie, one after the other
    pack: int  # which pack of the gradients' memory it is of
    begin: int  # its first element, counted in its pack
    start: int  # the same, counted in its first parameter
    size: int  # the number of elements, b
    gradients: Tensor | None  # [R, b], a row per term; None where they are not held from step to step
    moments: tuple[Tensor, ...]  # [., b] each, in the order of Moments
    group: Mapping[str, Any]  # the parameter group
    rows: int | Tensor  # which rows of tables [P, k] are its parameters': one for all of it, or one for each block
    cut: sharding.Sharding | None  # how its parameters are sharded
    device: torch.device = field(init=False)  # where it lies
    on_host: bool = field(init=False)
    block: int = field(init=False)  # elements of which each parameter takes whole blocks: 1 on the host
    dtype: torch.dtype = field(init=False)  # of the arithmetic
    packed: bool = field(init=False)  # whether it is of several parameters: coefficients differ from block to block
    gradient_rows: tuple[Tensor, ...] = field(init=False)  # [b] each, or [b / block, block]
    moment_rows: Moments = field(init=False)

    def __post_init__(self) -> None:
        first, block = self.parameters[0], self.places[0].block
        host = is_host(first.device)
        self.__dict__.update(device=first.device, on_host=host, block=block, dtype=wide_dtype([first]))
        self.__dict__.update(
            packed=len(self.members) > 1,
            gradient_rows=() if self.gradients is None else self.in_blocks(self.gradients).unbind(),
            moment_rows=Moments(*[self.in_blocks(moments).unbind() for moments in self.moments]),
        )

    def row_in(self, memory: GradientMemory) -> Tensor:
        """Its part of the first row of a memory that is made like its own: [b], or [b / block, block]."""
        return self.in_blocks(memory.columns(self.pack)[0, self.begin : self.begin + self.size])

    def in_blocks(self, flat: Tensor) -> Tensor:
        """Flat memory as the arithmetic takes it: [*, b] -> [*, b / block, block], or as it is for blocks of one."""
        return flat if self.block == 1 else flat.view(*flat.shape[:-1], -1, self.block)

    def runs(self, wanted: Sequence[bool], rows: Mapping[int, int], limit: int) -> Iterator[Chunk]:
        """Its parts over wanted members, of up to ``limit`` elements. ``rows``: of each member in tables.

        A parameter that does not lie in memory as it is used, so that it must be copied, is not cut.
        """
        bounds = tuple(accumulate((place.room for place in self.places), initial=0))
        first = last = 0  # the members of the next part
        for last, member in enumerate(self.members):
            begin, end = bounds[last], bounds[last + 1]
            if first < last and (not wanted[member] or end - bounds[first] > limit):
                yield self._part(first, last, slice(bounds[first], begin), rows)
                first = last
            if not wanted[member]:
                first = last + 1
            elif end - begin > limit and self.places[last].suits(sharding.local(self.parameters[last])):
                for cut in range(begin, end, limit):
                    yield self._part(last, last + 1, slice(cut, min(cut + limit, end)), rows)
                first = last + 1
        if first < len(self.members):
            yield self._part(first, len(self.members), slice(bounds[first], bounds[-1]), rows)

    def _part(self, first: int, last: int, elements: slice, rows: Mapping[int, int]) -> Chunk:
        places = self.places[first:last]
        mine = torch.tensor([rows[member] for member in self.members[first:last]], device="cpu")
        blocks = torch.tensor([place.room // self.block for place in places], device="cpu")
        return replace(
            self,
            members=self.members[first:last],
            parameters=self.parameters[first:last],
            places=places,
            begin=elements.start,
            start=elements.start - sum(place.room for place in self.places[:first]),
            size=elements.stop - elements.start,
            gradients=None if self.gradients is None else self.gradients[:, elements],
            moments=tuple(moments[:, elements] for moments in self.moments),
            rows=int(mine) if len(mine) == 1 else mine.repeat_interleave(blocks),
        )

    def gathered(self) -> Tensor | None:
        """The parameters' elements: a view of one, a copy of several; ``None`` if one lies in memory otherwise."""
        if self.block > 1:
            return self.joined(self.parameters)
        if self.packed:
            packed: Tensor = _flatten_dense_tensors(self.parameters)  # type: ignore[no-untyped-call]
            return packed
        whole = self._whole()
        return self._piece(whole) if self.places[0].suits(whole) else None

    def copied(self) -> Tensor:
        """A copy of the elements of a parameter that lies in memory otherwise."""
        return self._piece(self._whole())

    def elements_of(self, tensors: Sequence[Any]) -> Tensor:
        """The elements of tensors of the parameters' shapes: a view of one, if it lies in memory so, else a copy."""
        return self.joined(tensors) if self.packed or self.block > 1 else self._piece(tensors[0])

    def put_back(self, elements: Tensor) -> None:
        """Write to the parameters what ``gathered`` or ``copied`` gave, where that was not a view of them."""
        if self.block > 1:
            _copy_alike(*self._beside(self.parameters, elements.flatten()))
        elif self.packed:
            filled = [parameter for parameter in self.parameters if parameter.numel()]  # empty ones may come back flat
            if filled:
                torch._foreach_copy_(filled, _unflatten_dense_tensors(elements, filled))  # type: ignore[no-untyped-call]
        elif not (place := self.places[0]).suits(whole := self._whole()):
            copy = place.flat(whole)
            copy[self.start : self.start + len(elements)] = elements
            whole.copy_(place.view(copy, 0))

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of the elements of tensors of the parameters' shapes, in blocks, with zeros between them."""
        flat = torch.zeros(self.size, dtype=tensors[0].dtype, device=self.device)
        theirs, mine = self._beside(tensors, flat)
        _copy_alike(mine, theirs)
        return self.in_blocks(flat)

    def _beside(self, tensors: Sequence[Tensor], flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of tensors of the parameters' shapes, or of the piece of one, and of their places in flat memory."""
        if self.size < sum(place.room for place in self.places):  # a piece
            piece = self._piece(tensors[0].detach())
            return [piece], [flat[: len(piece)]]
        starts = accumulate((place.room for place in self.places), initial=0)
        mine = [place.view(flat, start) for place, start in zip(self.places, starts, strict=False)]
        return [tensor.detach() for tensor in tensors], mine

    def _piece(self, whole: Tensor) -> Tensor:
        return self.places[0].flat(whole)[self.start : self.start + self.size]

    def _whole(self) -> Tensor:
        parameter = self.parameters[0]
        return (sharding.local(parameter) if hasattr(parameter, "to_local") else parameter).detach()


def _copy_alike(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each; those that lie in memory alike in one kernel."""
    pairs = list(zip(targets, sources, strict=True))
    for alike in (True, False):
        found = [pair for pair in pairs if (pair[0].stride() == pair[1].stride()) is alike and pair[0].numel()]
        if found:
            mine, theirs = zip(*found, strict=True)
            torch._foreach_copy_(mine, theirs)


class Chunks:
    """The chunks of a step, and the coefficients of each. ``device``: where tables are."""

    def __init__(self, chunks: Iterable[Chunk], device: torch.device) -> None:
        self.parts = tuple(replace(c, rows=c.rows.to(device)) if isinstance(c.rows, Tensor) else c for c in chunks)
        alone = [chunk.rows for chunk in self.parts if isinstance(chunk.rows, int)]
        self._alone = torch.tensor(alone, dtype=torch.int64, device=device)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.parts)

    def spread(self, table: Tensor) -> list[Any]:
        """Give each element the row of its parameter, in its arithmetic, for each chunk.

        [P, k] -> [k, b], or [k, b / block, 1] in blocks; [k, 1] for one parameter.
        """
        alone, found = iter(table.index_select(0, self._alone)[:, :, None].unbind() if len(self._alone) else ()), []
        for chunk in self.parts:
            spread = next(alone) if isinstance(chunk.rows, int) else table.T.index_select(1, chunk.rows)
            if chunk.packed and chunk.block > 1:
                spread = spread[:, :, None]
            found.append(spread.to(chunk.device, chunk.dtype))
        return found

    def local(self, table: Coefficients) -> Iterable[Coefficients]:
        """The coefficients of each chunk, of those of all parameters."""
        none: list[Any] = [None] * len(self.parts)
        return map(Coefficients, *[none if one is None else self.spread(one) for one in table])
