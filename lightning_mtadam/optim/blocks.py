"""The blocks of a step with all their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim.kernels import Coefficients, Moments
from lightning_mtadam.optim.layout import Block, Span
from lightning_mtadam.optim.state import State, balance_dtype, join_moments


@dataclass(frozen=True)
class Work:
    """A block, and what an update of it reads and writes.

    Attributes:
        block: the block.
        parameters: its parameters; they may be sharded.
        moments: its moments.
        group: its parameter group.
        rows: which rows of tables [P, k] are its parameters': one for all of it, or one for each element.
        cut: how its parameters are sharded.
    """

    block: Block
    parameters: list[Tensor]
    moments: Moments
    group: Mapping[str, Any]
    rows: int | Tensor
    cut: sharding.Sharding | None

    @property
    def _start(self) -> int:
        return self.block.begin - self.block.span.bounds[self.block.first]

    @cached_property
    def _packed(self) -> bool:
        return len(self.parameters) > 1

    @property
    def scattered(self) -> bool:
        """Whether it is a parameter, or a piece of one, that is not contiguous: to flatten it copies all of it."""
        return not self._packed and not self._whole().is_contiguous()

    def elements(self) -> Tensor:
        """The parameters' elements, flat; a view if they are one parameter's, and contiguous."""
        if self._packed:
            packed: Tensor = _flatten_dense_tensors(self.parameters)  # type: ignore[no-untyped-call]
            return packed
        flat = self._whole().detach().reshape(-1)
        size = self.block.end - self.block.begin
        return flat if len(flat) == size else flat[self._start : self._start + size]

    def put_back(self, flat: Tensor) -> None:
        """Write to the parameters what was not a view of them."""
        if self._packed:
            filled = [parameter for parameter in self.parameters if parameter.numel()]  # empty ones may come back flat
            if filled:
                torch._foreach_copy_(filled, _unflatten_dense_tensors(flat, filled))  # type: ignore[no-untyped-call]
            return
        whole = self._whole()
        if not whole.is_contiguous():
            whole = whole.detach()
            copy = whole.reshape(-1)
            copy[self._start : self._start + len(flat)] = flat
            whole.copy_(copy.view_as(whole))

    def _whole(self) -> Tensor:
        return sharding.local(self.parameters[0])


class Works:
    """The blocks of a step.

    Args:
        works: one for each.
        device: where tables are.
    """

    def __init__(self, works: Sequence[Work], device: torch.device) -> None:
        self._works = tuple(works)
        rows = [work.rows for work in works if isinstance(work.rows, int)]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._places = [(work.parameters[0].device, balance_dtype(work.parameters[:1])) for work in works]

    def __iter__(self) -> Iterator[Work]:
        return iter(self._works)

    def spread(self, table: Tensor) -> Iterator[Tensor]:
        """Give each element the row of its parameter: [P, k] -> [k, elements]; one parameter's for all, [k, 1].

        They are in the dtype of the arithmetic, on the device of the block.
        """
        single = iter(table.index_select(0, self._rows)[:, :, None].unbind())
        for work, place in zip(self._works, self._places, strict=True):
            found = next(single) if isinstance(work.rows, int) else table.T.index_select(1, work.rows)
            yield found if place == (table.device, table.dtype) else found.to(*place)

    def local(self, table: Coefficients) -> Iterator[Coefficients]:
        """The coefficients of each block, of those of all parameters."""

        def spread(rows: Tensor | None) -> Iterator[Tensor | None]:
            return repeat(None, len(self._works)) if rows is None else self.spread(rows)

        shared = zip(*map(self.spread, (table.scales, table.weights, table.factor)), strict=True)
        others = zip(spread(table.reaching), spread(table.correction), strict=True)
        for work, three, (reaching, correction) in zip(self._works, shared, others, strict=True):
            own = None if work.moments.max_exp_avg_sq is None else correction
            scales, weights, factor = three
            yield Coefficients(scales, weights, factor, reaching, own)


class Workshop:
    """Finds the tensors of blocks, and keeps what it found as long as it holds.

    Args:
        parameters: all of the optimizer's.
        rows: the row of each of those that have a state.
        states: by row.
        groups: by row.
        leading: how many first and second moments there are of each element.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rows: Mapping[int, int],
        states: Sequence[State],
        groups: Sequence[Mapping[str, Any]],
        leading: tuple[int, int],
    ) -> None:
        self.parameters, self.rows, self.states, self.groups, self.leading = parameters, rows, states, groups, leading
        self.shardings = [sharding.sharding_of(parameter) for parameter in parameters]
        self._device = states[0]["step"].device
        self._spans: Sequence[Span] = ()
        self._moments: dict[Span, Moments] = {}
        self._found: dict[tuple[tuple[bool, ...], int], Works] = {}

    def works(self, spans: Sequence[Span], touched: Sequence[bool], limit: int) -> Works:
        """The blocks over the parameters that are touched, by row; large ones are cut at ``limit`` elements."""
        if spans is not self._spans:
            self._spans, self._moments, self._found = spans, {}, {}
        key = (tuple(touched), limit)
        if key not in self._found:
            wanted = [index in self.rows and touched[self.rows[index]] for index in range(len(self.parameters))]
            self._found = {
                key: Works([self._find(block) for span in spans for block in span.runs(wanted, limit)], self._device)
            }
        return self._found[key]

    def _find(self, block: Block) -> Work:
        if block.span not in self._moments:
            self._moments[block.span] = self._join(block.span)
        moments = self._moments[block.span]
        cut = slice(block.begin, block.end)
        rows = [self.rows[member] for member in block.members]
        return Work(
            block=block,
            parameters=[self.parameters[member] for member in block.members],
            moments=replace(
                moments,
                exp_avg=moments.exp_avg[:, cut],
                exp_avg_sq=moments.exp_avg_sq[:, cut],
                max_exp_avg_sq=None if moments.max_exp_avg_sq is None else moments.max_exp_avg_sq[:, cut],
            ),
            group=self.groups[rows[0]],
            rows=rows[0] if len(rows) == 1 else self._each(rows, block),
            cut=self.shardings[block.members[0]],
        )

    def _each(self, rows: Sequence[int], block: Block) -> Tensor:
        sizes = torch.tensor(block.sizes, device="cpu")
        return torch.tensor(rows, device="cpu").repeat_interleave(sizes).to(self._device)

    def _join(self, span: Span) -> Moments:
        states = [self.states[self.rows[member]] for member in span.members]
        sizes = span.sizes
        first, second = self.leading
        return Moments(
            exp_avg=join_moments(states, "exp_avg", first, sizes),
            exp_avg_sq=join_moments(states, "exp_avg_sq", second, sizes),
            max_exp_avg_sq=join_moments(states, "max_exp_avg_sq", second, sizes)
            if "max_exp_avg_sq" in states[0]
            else None,
        )
