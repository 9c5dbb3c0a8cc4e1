"""The blocks of a step with all their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim.kernels import Coefficients, Moments
from lightning_mtadam.optim.layout import Block, Span
from lightning_mtadam.optim.state import State, join_moments


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

    def elements(self) -> Tensor:
        """The parameters' elements, flat; a view if they are one parameter's, and contiguous."""
        if self._packed:
            flat: Tensor = _flatten_dense_tensors(self.parameters)  # type: ignore[no-untyped-call]
            return flat
        whole = sharding.local(self.parameters[0]).detach().reshape(-1)
        return whole[self._start : self._start + self.block.end - self.block.begin]

    def put_back(self, flat: Tensor) -> None:
        """Write to the parameters what was not a view of them."""
        if self._packed:
            pieces = _unflatten_dense_tensors(flat, self.parameters)  # type: ignore[no-untyped-call]
            torch._foreach_copy_(self.parameters, pieces)
            return
        whole = sharding.local(self.parameters[0]).detach()
        if not whole.is_contiguous():
            copy = whole.reshape(-1)
            copy[self._start : self._start + len(flat)] = flat
            whole.copy_(copy.view_as(whole))

    def spread(self, table: Tensor) -> Tensor:
        """Give each element the row of its parameter, [P, k] -> [k, elements]; one parameter's for all, [k, 1]."""
        if isinstance(self.rows, int):
            return table[self.rows][:, None]
        return table.T.index_select(1, self.rows)

    def local(self, table: Coefficients, device: torch.device, dtype: torch.dtype) -> Coefficients:
        """The coefficients of the block, of those of all parameters."""

        def spread(rows: Tensor) -> Tensor:
            return self.spread(rows).to(device, dtype)

        amsgrad = self.moments.max_exp_avg_sq is not None
        return Coefficients(
            scales=spread(table.scales),
            weights=spread(table.weights),
            factor=spread(table.factor),
            reaching=None if table.reaching is None else spread(table.reaching),
            correction=spread(table.correction) if amsgrad and table.correction is not None else None,
        )


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
        self._spans: Sequence[Span] = ()
        self._moments: dict[Span, Moments] = {}
        self._found: dict[tuple[tuple[bool, ...], int], list[Work]] = {}

    def works(self, spans: Sequence[Span], touched: Sequence[bool], limit: int) -> list[Work]:
        """The blocks over the parameters that are touched, by row; large ones are cut at ``limit`` elements."""
        if spans is not self._spans:
            self._spans, self._moments, self._found = spans, {}, {}
        key = (tuple(touched), limit)
        if key not in self._found:
            wanted = [index in self.rows and touched[self.rows[index]] for index in range(len(self.parameters))]
            self._found = {key: [self._find(block) for span in spans for block in span.runs(wanted, limit)]}
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
        return torch.tensor(rows, device="cpu").repeat_interleave(sizes).to(self.states[rows[0]]["step"].device)

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
