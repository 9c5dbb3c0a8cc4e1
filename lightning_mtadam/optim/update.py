"""Runs the update of every chunk: Algorithm 1 as it is written, or what does the same faster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.collect.norms import FiniteWatch, is_host
from lightning_mtadam.collect.pending import PendingGradients
from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim import accelerate, algorithm
from lightning_mtadam.optim.chunks import Chunk, Chunks, Coefficients, Moments, Numbers
from lightning_mtadam.optim.schedule import SUM
from lightning_mtadam.optim.state import join_moments, leading_of
from lightning_mtadam.optim.tables import Tables

BLOCK = 1 << 18  # elements of a chunk of the host: calls cost little, and what all terms share stays in its cache
SCRATCH = 1 << 26  # bytes of memory for results on an accelerator, beside one time the parameters
WHOLE = 1 << 62


class _Prepared(NamedTuple):
    """What stays the same over steps that reach the same parameters."""

    memory: GradientMemory
    chunks: Chunks
    jobs: list[tuple[Chunk, Callable[..., None] | None]]  # with what updates each
    touched: Tensor  # [P, 1], whether any term's graph reaches the parameter


class Updater:
    """Keeps what stays the same from step to step: chunks, what updates them, and scratch memory."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.options = tables, tables.options
        self._steps = accelerate.CompiledTables(tables) if self.options.compile else tables
        self._prepared: dict[Any, _Prepared] = {}
        self._scratch = torch.empty(0, device="cpu")
        self._kept: dict[Any, Chunks] = {}

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
        self.follow_groups(limit if kind == "value" else None, finite)
        self._prepare(pending)
        if pending.light:
            frozen = tables.frozen_scales
            scales, coefficients = self._steps.light(norms, self._now.touched, frozen, finite)
        else:
            present = tables.constant([term in pending.gradients for term in tables.terms], torch.bool)
            scales, coefficients = self._steps.measured(norms, self._now.touched, present, finite)
            tables.freeze(None if self.options.compile else scales)  # compiled, the last digit may be another
        if limit is not None and kind == "norm":
            factor = self._clip_factor(coefficients.scales, limit)
            scales, coefficients = scales * factor, coefficients._replace(scales=coefficients.scales * factor)
        return (frozen * scales if pending.light else scales), coefficients

    def run(self, coefficients: Coefficients) -> None:
        """Update moments and parameters."""
        # To gather elements between updates, which flush the cache, would take longer; but what is scattered is copied.
        early = [None if update is None else chunk.gathered() for chunk, update in self._now.jobs]
        for (chunk, update), held, local in zip(
            self._now.jobs, early, self._now.chunks.local(coefficients), strict=True
        ):
            if update is None:
                self._use_up(chunk, local)
                continue
            flat, scratch = chunk.copied() if held is None else held, self.scratch(chunk, local.scales.dtype)
            update(flat, chunk.gradient_rows, chunk.moment_rows, local, self.numbers_at(chunk), scratch)
            if held is None:
                chunk.put_back(flat)
        for (chunk, _), held in zip(self._now.jobs, early, strict=True):
            if held is not None and (chunk.packed or chunk.block > 1):
                chunk.put_back(held)

    def follow_groups(self, limit: float | None = None, finite: Tensor | None = None) -> None:
        """Take the numbers of the groups as they are now. ``finite``: as of :meth:`observe`."""
        self.tables.follow_groups()
        skipped, denominator = None if finite is None else ~finite, self.options.denominator
        groups = self.tables.distinct
        self._numbers = {id(group): Numbers.of(group, denominator, limit, skipped) for group in groups}
        self._flags = {} if skipped is None else {device: skipped.to(device) for device in self.tables.devices}

    def numbers_at(self, chunk: Chunk) -> Numbers:
        """The numbers of the chunk's group."""
        numbers: Numbers = self._numbers[id(chunk.group)]._replace(skipped=self._flags.get(chunk.device))
        return numbers

    def scratch(self, chunk: Chunk, dtype: torch.dtype) -> Tensor | None:
        """Memory [2, b] for results; fresh memory for every chunk would cost more than what is done with it."""
        if (self.options.compile and chunk.size > 1) or not is_host(chunk.device):
            return None
        kept = self._scratch
        if kept.dtype != dtype or kept.numel() < 2 * chunk.size:
            kept = self._scratch = torch.empty(2 * chunk.size, dtype=dtype, device=chunk.device)
        return kept[: 2 * chunk.size].view(2, chunk.size)

    def chunks_like(self, memory: GradientMemory, wanted: Sequence[bool]) -> Chunks:
        """The chunks over the parameters that are wanted, without gradients; kept. Memories differ from step to step.

        On an accelerator each is so short that what is made of it fits the memory for results.
        """
        key = tuple(memory.places), tuple(wanted)  # a place depends on the memory format of its parameter
        if key not in self._kept:
            if len(self._kept) > 64:  # flags that change from step to step
                self._kept.clear()
            wholes = (replace(whole, gradients=None) for whole in self._wholes(memory))
            self._kept[key] = self._cut(wholes, wanted, lambda one: BLOCK if is_host(one.device) else _length(one, 4))
        return self._kept[key]

    def _cut(self, wholes: Iterable[Chunk], wanted: Sequence[bool], limit: Callable[[Chunk], int]) -> Chunks:
        """The parts over the parameters that are wanted, of up to ``limit`` elements."""
        rows = self.tables.row_of
        return Chunks((part for whole in wholes for part in whole.runs(wanted, rows, limit(whole))), self.tables.device)

    def _prepare(self, pending: PendingGradients) -> None:
        """Find the chunks over the parameters that have gradients, and what updates each, unless they are as before."""
        memory, tables, touched = pending.memory, self.tables, pending.touched
        assert memory is not None
        kinds = [(one.no_eps, one.limit is None, one.skipped is None, one.eps) for one in self._numbers.values()]
        key = (memory, memory.active, tuple(touched), tuple(kinds), torch.get_num_threads())
        if key not in self._prepared:
            if len(self._prepared) > 8 or any(kept.memory is not memory for kept in self._prepared.values()):
                self._prepared.clear()
            wholes, compiled = self._wholes(memory), self.options.compile
            chunks = self._cut(wholes, touched, lambda one: BLOCK if is_host(one.device) and not compiled else WHOLE)
            jobs = [(chunk, self._update_of(chunk)) for chunk in chunks]
            flags = tables.constant([touched[member] for member in tables.members], torch.bool)[:, None]
            self._prepared[key] = _Prepared(memory, chunks, jobs, flags)
        self._now = self._prepared[key]

    def _update_of(self, chunk: Chunk) -> Callable[..., None] | None:
        """What updates the chunk; ``None``: the gradients' own memory serves for results."""
        numbers = self.numbers_at(chunk)
        faster = accelerate.faster(chunk, numbers, self.options)
        if faster is not None or is_host(chunk.device):
            return faster or algorithm.update
        makes_more = _is_narrow(chunk) or numbers.limit is not None or chunk.moment_rows.largest
        return partial(_update_in_pieces, _length(chunk, 3 * len(chunk.gradient_rows) + 4)) if makes_more else None

    def _use_up(self, chunk: Chunk, local: Coefficients) -> None:
        """Update a chunk of an accelerator, where kernels are few and large: memory for results would be so, too."""
        rows, moments, numbers = chunk.gradient_rows, chunk.moment_rows, self.numbers_at(chunk)
        algorithm.absorb_all(rows, rows[0], moments, local, numbers, rows)
        held = chunk.gathered()
        flat = chunk.copied() if held is None else held
        algorithm.move(flat, rows[0], moments, local, numbers, rows[0])
        chunk.put_back(flat)
        self._now.memory.used_up = True

    def _wholes(self, memory: GradientMemory) -> Iterator[Chunk]:
        """A chunk for each pack of the memory."""
        tables, leading = self.tables, leading_of(self.options, len(self.tables.terms))
        for index, (pack, places) in enumerate(zip(memory.packs, memory.places, strict=True)):
            states = [tables.states[tables.row_of[member]] for member in pack]
            for key in {key for state in states for key in state if key in leading}:
                for state in states:
                    if key not in state:  # it is from before the group had amsgrad
                        state[key] = torch.zeros_like(state["exp_avg_sq"])
            moments = [join_moments(states, key, many, places) for key, many in leading.items() if key in states[0]]
            row, parameters = tables.row_of[pack[0]], tuple(tables.parameters[member] for member in pack)
            gradients, owner = memory.columns(index), (tables.groups[row], row, tables.shardings[row])
            lies = places, index, 0, 0, gradients.shape[1]
            yield Chunk(tuple(pack), parameters, *lies, gradients, tuple(moments), *owner)

    def _clip_factor(self, scales: Tensor, limit: float) -> Tensor:
        """By what to multiply the balanced gradient, to bring its L2 norm to ``limit``; ``scales`` are [P, I]."""
        parts: dict[sharding.Sharding | None, list[Tensor]] = {cut: [] for cut in self.tables.shardings}
        for chunk, local in zip(self._now.chunks, self._now.chunks.spread(scales), strict=True):
            length = chunk.size if is_host(chunk.device) else _length(chunk, 2 * len(chunk.gradient_rows) + 1)
            for piece in _pieces(chunk.gradient_rows[0], length // chunk.block):
                rows = [row[piece] for row in chunk.gradient_rows]
                total = algorithm.balanced_sum(rows, _cut_at(piece, local))
                parts[chunk.cut].append(torch.linalg.vector_norm(total).to(scales))
        zero = torch.zeros_like(scales[0, 0])  # this process's part of a tensor may be empty
        norms = [torch.linalg.vector_norm(torch.stack([zero, *mine])) for mine in parts.values()]
        joined = [sharding.join_norms(norm, cut) for norm, cut in zip(norms, parts, strict=True)]
        factor: Tensor = limit / (torch.linalg.vector_norm(torch.stack(joined)) + 1e-6)
        return factor.clamp(max=1)  # as torch.nn.utils.clip_grad_norm_


def _is_narrow(chunk: Chunk) -> bool:
    """Whether its arithmetic is in a wider dtype than its parameters are."""
    return chunk.dtype != chunk.parameters[0].dtype


def _length(chunk: Chunk, rows: int) -> int:
    """How many elements, in whole blocks, have room for so many rows of results, and for moments that are widened."""
    rows += sum(map(len, chunk.moment_rows)) if _is_narrow(chunk) else 0
    return max(1, SCRATCH // (rows * chunk.dtype.itemsize) // chunk.block) * chunk.block


def _pieces(row: Tensor, length: int) -> Iterator[slice]:
    """Of a row, [b] or [b / block, block], pieces of ``length`` along its first dimension."""
    yield from (slice(begin, begin + length) for begin in range(0, len(row), max(1, length)))


def _cut_at(piece: slice, coefficients: Tensor) -> Tensor:
    """The same piece of coefficients; those that are the same for all of the chunk as they are."""
    return coefficients if coefficients.shape[1] == 1 else coefficients[:, piece]


def _update_in_pieces(
    length: int,
    parameter: Tensor,
    gradients: algorithm.Rows,
    moments: Moments,
    local: Coefficients,
    numbers: Numbers,
    _: None,
) -> None:
    """As ``algorithm.update``, where that makes more than one row of results: of ``length`` elements at a time."""
    for piece in _pieces(parameter, length // max(1, parameter[:1].numel())):
        mine = Moments(*[[row[piece] for row in rows] for rows in moments])
        theirs = Coefficients(*[None if rows is None else _cut_at(piece, rows) for rows in local])  # type: ignore[arg-type]
        algorithm.update(parameter[piece], [row[piece] for row in gradients], mine, theirs, numbers, None)
