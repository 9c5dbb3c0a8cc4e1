"""The runs of elements that a step works on: large parameters are cut, small ones of a group lie side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lightning_mtadam.collect.norms import wide_dtype
from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim.options import Denominator


class Numbers(NamedTuple):
    """What a parameter group says, and what holds for all groups; compiled, scalar tensors in place of floats."""

    lr: Any  # negative to maximize
    share: Any  # 1 - beta1
    eps: Any
    decay: Any  # 1 - lr * weight_decay; None without weight decay
    limit: Any  # of the entries of the balanced gradient, where it is clipped by value
    denominator: Denominator
    no_eps: bool  # whether eps is zero
    finite: Tensor | None  # a boolean scalar: where it is false nothing may change; None: it is known to be true

    @classmethod
    def of(cls, group: Mapping[str, Any], denominator: Denominator, limit: float | None, finite: Tensor | None) -> Any:
        """The numbers of a group as they are now."""
        lr, eps = float(group["lr"]), float(group["eps"])
        decay = 1 - lr * group["weight_decay"] if group["weight_decay"] else None
        share = 1 - float(group["betas"][0])
        return cls(-lr if group["maximize"] else lr, share, eps, decay, limit, denominator, eps == 0, finite)


class Coefficients(NamedTuple):
    """What differs between layers and terms: [I, b] of a chunk, or [I, 1]; of all parameters together [P, I]."""

    scales: Tensor  # importance_i n_anchor / n_i   (Alg. 1, line 8)
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
    """Elements that lie side by side: of one parameter, a piece of it, or several small ones."""

    members: tuple[int, ...]  # the indices of its parameters
    parameters: tuple[Tensor, ...]  # they themselves; they may be sharded
    sizes: tuple[int, ...]  # how many elements of each are in it
    start: int  # the first of its elements, counted in its first parameter
    gradients: Tensor | None  # [R, b], a row per term; None where gradients are not held
    moments: tuple[Tensor, ...]  # [., b] each, in the order of Moments
    group: Mapping[str, Any]  # the parameter group
    rows: int | Tensor  # which rows of tables [P, k] are its parameters': one for all of it, or one for each element
    cut: sharding.Sharding | None  # how its parameters are sharded
    size: int = field(init=False)  # the number of elements, b
    packed: bool = field(init=False)  # whether it is of several parameters: coefficients differ from element to element
    gradient_rows: tuple[Tensor, ...] = field(init=False)  # [b] each
    moment_rows: Moments = field(init=False)

    def __post_init__(self) -> None:
        rows = () if self.gradients is None else self.gradients.unbind()
        moments = Moments(*[moments.unbind() for moments in self.moments])
        self.__dict__.update(
            size=sum(self.sizes), packed=len(self.members) > 1, gradient_rows=rows, moment_rows=moments
        )

    def runs(self, wanted: Sequence[bool], rows: Mapping[int, int], limit: int) -> Iterator[Chunk]:
        """Its parts over wanted members; one parameter is cut at ``limit``. ``rows``: of each member in tables."""
        if not self.packed:
            pieces = range(0, self.size if wanted[self.members[0]] else 0, limit)
            yield from (self._part(0, 1, slice(begin, min(begin + limit, self.size)), rows) for begin in pieces)
            return
        first, bounds = 0, tuple(accumulate(self.sizes, initial=0))
        for last, member in enumerate((*self.members, None)):
            if member is None or not wanted[member]:
                if last > first:
                    yield self._part(first, last, slice(bounds[first], bounds[last]), rows)
                first = last + 1

    def _part(self, first: int, last: int, elements: slice, rows: Mapping[int, int]) -> Chunk:
        members, sizes = self.members[first:last], self.sizes[first:last]
        mine = torch.tensor([rows[member] for member in members], device="cpu")
        return replace(
            self,
            members=members,
            parameters=self.parameters[first:last],
            sizes=sizes if len(members) > 1 else (elements.stop - elements.start,),
            start=elements.start if not self.packed else 0,
            gradients=None if self.gradients is None else self.gradients[:, elements],
            moments=tuple(moments[:, elements] for moments in self.moments),
            rows=int(mine) if len(mine) == 1 else mine.repeat_interleave(torch.tensor(sizes, device="cpu")),
        )

    def gathered(self) -> Tensor | None:
        """The parameters' elements, flat: a view of one parameter, a copy of several; ``None`` if it is scattered."""
        if self.packed:
            packed: Tensor = _flatten_dense_tensors(self.parameters)  # type: ignore[no-untyped-call]
            return packed
        whole = self._whole()
        return whole.view(-1)[self.start : self.start + self.size] if whole.is_contiguous() else None

    def copied(self) -> Tensor:
        """The elements of a parameter that is not contiguous: to flatten it copies all of it."""
        return self._whole().reshape(-1)[self.start : self.start + self.size]

    def put_back(self, flat: Tensor) -> None:
        """Write to the parameters what ``gathered`` or ``copied`` gave, where that was not a view of them."""
        if self.packed:
            filled = [parameter for parameter in self.parameters if parameter.numel()]  # empty ones may come back flat
            if filled:
                torch._foreach_copy_(filled, _unflatten_dense_tensors(flat, filled))  # type: ignore[no-untyped-call]
        elif not (whole := self._whole()).is_contiguous():
            copy = whole.reshape(-1)
            copy[self.start : self.start + len(flat)] = flat
            whole.copy_(copy.view_as(whole))

    def _whole(self) -> Tensor:
        parameter = self.parameters[0]
        return (sharding.local(parameter) if hasattr(parameter, "to_local") else parameter).detach()


class Chunks:
    """The chunks of a step, and the coefficients of each. ``device``: where tables are."""

    def __init__(self, chunks: Iterable[Chunk], device: torch.device) -> None:
        self._chunks = tuple(replace(c, rows=c.rows.to(device)) if isinstance(c.rows, Tensor) else c for c in chunks)
        alone = [chunk.rows for chunk in self._chunks if isinstance(chunk.rows, int)]
        self._alone = torch.tensor(alone, dtype=torch.int64, device=device)
        self._places = [(chunk.parameters[0].device, wide_dtype(chunk.parameters[:1])) for chunk in self._chunks]

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks)

    def spread(self, table: Tensor | None) -> list[Any]:
        """Give each element the row of its parameter, in its arithmetic: [P, k] -> [k, b] for each chunk, or [k, 1]."""
        if table is None:
            return [None] * len(self._chunks)
        alone, found = iter(table.index_select(0, self._alone)[:, :, None].unbind()), []
        for chunk, place in zip(self._chunks, self._places, strict=True):
            spread = next(alone) if isinstance(chunk.rows, int) else table.T.index_select(1, chunk.rows)
            found.append(spread if place == (table.device, table.dtype) else spread.to(*place))
        return found

    def local(self, table: Coefficients) -> Iterable[Coefficients]:
        """The coefficients of each chunk, of those of all parameters."""
        return map(Coefficients, *map(self.spread, table))
