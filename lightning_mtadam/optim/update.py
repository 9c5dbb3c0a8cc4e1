"""Runs the update of every chunk: Algorithm 1 as it is written, or what does the same faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam.collect.norms import FiniteWatch
from lightning_mtadam.collect.pending import PendingGradients
from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim import accelerate, algorithm
from lightning_mtadam.optim.chunks import Chunk, Chunks, Coefficients, Numbers
from lightning_mtadam.optim.schedule import SUM
from lightning_mtadam.optim.state import join_moments
from lightning_mtadam.optim.tables import Tables

BLOCK = 1 << 18  # elements of a chunk: calls cost little, and what all terms share stays in a core's cache


class Updater:
    """Keeps what stays the same from step to step: chunks, what updates them, and scratch memory."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.options = tables, tables.options
        self._steps = accelerate.CompiledTables(tables) if self.options.compile else tables
        self._key: Any = None
        self._scratch = torch.empty(0)

    def observe(self, pending: PendingGradients, watch: FiniteWatch) -> tuple[Tensor, Tensor | None]:
        """The norms of the gradients, [P, I], which must be finite: ``None``, or a flag if the host cannot know yet."""
        rows = (SUM,) if pending.light else self.tables.terms
        norms = self.tables.observe(pending, rows)
        return norms, watch.check(norms, self.tables.names, rows)

    def balance(self, pending: PendingGradients, norms: Tensor, finite: Tensor | None) -> tuple[Tensor, Coefficients]:
        """Let norms, scales and clocks see the step; what cannot be compiled raises before.

        Gives what multiplies the terms' gradients, [L, I], and the coefficients of all parameters.
        """
        tables, (kind, limit) = self.tables, pending.clip or (None, None)
        self.numbers = self.numbers_of(limit if kind == "value" else None, finite)
        self._prepare(pending)
        tables.follow_groups()
        if pending.light:
            frozen = tables.frozen_scales
            scales, coefficients = self._steps.light(norms, self._touched, frozen, finite)
        else:
            present = tables.constant([term in pending.gradients for term in tables.terms], torch.bool)
            scales, coefficients = self._steps.measured(norms, self._touched, present, finite)
            tables.__dict__.pop("frozen_scales", None)
        if limit is not None and kind == "norm":
            factor = self._clip_factor(coefficients.scales, limit)
            scales, coefficients = scales * factor, coefficients._replace(scales=coefficients.scales * factor)
        return (frozen * scales if pending.light else scales), coefficients

    def run(self, coefficients: Coefficients) -> None:
        """Update moments and parameters."""
        # To gather elements between updates, which flush the cache, would take longer; but what is scattered is copied.
        early = [chunk.gathered() for chunk in self._chunks]
        work = zip(self._chunks, self._updates, early, self._chunks.local(coefficients), strict=True)
        for chunk, update, held, local in work:
            flat, scratch = chunk.copied() if held is None else held, self.scratch(chunk, local.scales.dtype)
            update(flat, chunk.gradient_rows, chunk.moment_rows, local, self.numbers[id(chunk.group)], scratch)
            if held is None:
                chunk.put_back(flat)
        for chunk, held in zip(self._chunks, early, strict=True):
            if held is not None and chunk.packed:
                chunk.put_back(held)

    def numbers_of(self, limit: float | None = None, finite: Tensor | None = None) -> dict[int, Numbers]:
        """The numbers of each group as they are now, by its identity."""
        denominator = self.options.denominator
        return {id(group): Numbers.of(group, denominator, limit, finite) for group in self.tables.distinct}

    def scratch(self, chunk: Chunk, dtype: torch.dtype) -> Tensor | None:
        """Memory [2, b] for results; fresh memory for every chunk would cost more than what is done with it."""
        if self.options.compile and chunk.size > 1:
            return None
        kept, device = self._scratch, chunk.parameters[0].device
        if (kept.dtype, kept.device) != (dtype, device) or kept.numel() < 2 * chunk.size:
            kept = self._scratch = torch.empty(2 * chunk.size, dtype=dtype, device=device)
        return kept[: 2 * chunk.size].view(2, chunk.size)

    @cached_property
    def chunks_of_one(self) -> Chunks:
        """The chunks over all parameters that have a state, of one each, without gradients."""
        packs = [([member], None) for member in self.tables.members]
        everything = [True] * len(self.tables.parameters)
        return self._chunks_of(packs, everything, BLOCK)

    def _prepare(self, pending: PendingGradients) -> None:
        """Find the chunks over the parameters that have gradients, and what updates each, unless they are as before."""
        memory, tables, touched = pending.memory, self.tables, pending.touched
        assert memory is not None
        kinds = [(one.no_eps, one.limit is None, one.finite is None, one.eps) for one in self.numbers.values()]
        key = (memory, memory.active, touched, kinds, torch.get_num_threads())
        if key == self._key:
            return
        limit = 1 << 62 if self.options.compile else BLOCK
        packs = [(pack, memory.columns(place)) for place, pack in enumerate(memory.packs)]
        self._chunks = self._chunks_of(packs, touched, limit)
        numbers, plain = self.numbers, algorithm.update
        self._updates = [accelerate.faster(c, numbers[id(c.group)], self.options) or plain for c in self._chunks]
        self._touched = tables.constant([touched[member] for member in tables.members], torch.bool)[:, None]
        self._key = key

    def _chunks_of(self, packs: Iterable[tuple[list[int], Any]], wanted: Sequence[bool], limit: int) -> Chunks:
        """The chunks over the parameters that are wanted, of packs with their gradients; cut at ``limit`` elements."""
        wholes = [self._whole(pack, gradients) for pack, gradients in packs]
        rows = self.tables.row_of
        return Chunks((part for whole in wholes for part in whole.runs(wanted, rows, limit)), self.tables.device)

    def _whole(self, pack: Sequence[int], gradients: Tensor | None) -> Chunk:
        tables, row = self.tables, self.tables.row_of[pack[0]]
        states = [tables.states[tables.row_of[member]] for member in pack]
        parameters = tuple(tables.parameters[member] for member in pack)
        sizes = tuple(sharding.local(parameter).numel() for parameter in parameters)
        leading = {"exp_avg": tables.moments[0], "exp_avg_sq": tables.moments[1], "max_exp_avg_sq": tables.moments[1]}
        moments = tuple(join_moments(states, key, many, sizes) for key, many in leading.items() if key in states[0])
        group, cut = tables.groups[row], tables.shardings[row]
        return Chunk(tuple(pack), parameters, sizes, 0, gradients, moments, group, row, cut)

    def _clip_factor(self, scales: Tensor, limit: float) -> Tensor:
        """By what to multiply the balanced gradient, to bring its L2 norm to ``limit``; ``scales`` are [P, I]."""
        parts: dict[sharding.Sharding | None, list[Tensor]] = {cut: [] for cut in self.tables.shardings}
        for chunk, local in zip(self._chunks, self._chunks.spread(scales), strict=True):
            total = algorithm.balanced_sum(chunk.gradient_rows, local)
            parts[chunk.cut].append(torch.linalg.vector_norm(total).to(scales))
        zero = torch.zeros_like(scales[0, 0])  # this process's part of a tensor may be empty
        norms = [torch.linalg.vector_norm(torch.stack([zero, *mine])) for mine in parts.values()]
        joined = [sharding.join_norms(norm, cut) for norm, cut in zip(norms, parts, strict=True)]
        factor: Tensor = limit / (torch.linalg.vector_norm(torch.stack(joined)) + 1e-6)
        return factor.clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
