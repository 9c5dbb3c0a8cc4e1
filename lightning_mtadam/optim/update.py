"""Runs the update of every chunk: Algorithm 1 as it is written, or what does the same faster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mtadam.balancing import norms_of
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.edits.refusing import refuse_unbounded
from lightning_mtadam.edits.sharing import share
from lightning_mtadam.edits.shown import ShownGradients
from lightning_mtadam.finite import FiniteWatch
from lightning_mtadam.optim import accelerate, algorithm
from lightning_mtadam.optim.chunks import Chunk, Chunks, Coefficients, Moments, Numbers
from lightning_mtadam.optim.light import SUM
from lightning_mtadam.optim.state import join_moments, leading_of
from lightning_mtadam.optim.tables import Tables, Weighed

BLOCK = 1 << 18  # elements of a chunk of the host: calls cost little, and what all terms share stays in its cache
SCRATCH = 1 << 26  # bytes of memory for results on an accelerator, beside one time the parameters
WHOLE = 1 << 62


class _Prepared(NamedTuple):
    """What stays the same over steps that reach the same parameters."""

    memory: GradientMemory
    chunks: Chunks
    flags: list[bool]  # [P], whether any term's graph reaches the parameter
    touched: Tensor  # the same of those that have a state, [P, 1]
    present: Tensor  # [I], whether the term has gradients
    jobs: dict[Any, list[tuple[Chunk, Callable[..., None] | None]]]  # with what updates each, by kinds of numbers


class _Looked(NamedTuple):
    """What was found in ``backward``."""

    observed: Tensor  # the norms of the gradients, [P, I]
    touched: Tensor  # [P, 1]
    weighed: Weighed | None  # what follows; None for the gradients of a sum


class Updater:
    """Keeps what stays the same from step to step: chunks, what updates them, and scratch memory."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.options = tables, tables.options
        self._steps = accelerate.CompiledTables(tables) if self.options.compile else tables
        self._prepared: dict[Any, _Prepared] = {}
        self._scratch = torch.empty(0, device="cpu")
        self._kept: dict[Any, Chunks] = {}
        self.joined = False  # whether moments of several parameters were brought together since this was noted
        self._weighed: _Looked | None = None  # of what is pending

    def show(self, pending: ShownGradients) -> tuple[GradientMemory, list[bool]]:
        """The balanced gradient of what is pending, the sum over the terms as scaled; and which parameters have one."""
        assert pending.memory is not None
        now, shown = self._prepare(pending), pending.memory.beside()
        self._weighed = self._weigh(pending, now)
        weighed = self._weighed.weighed
        if weighed is None:
            for mine, rows in zip(shown.rows, pending.memory.rows, strict=True):
                mine.copy_(rows[:1])
            return shown, now.flags
        spread = now.chunks.spread(self.tables.by_parameter(weighed.scales))
        for chunk, scales in zip(now.chunks.parts, spread, strict=True):
            total, gradients = chunk.row_in(shown), chunk.gradient_rows
            scratch = self.scratch(chunk, scales.dtype)
            if scratch is not None and total.dtype == scales.dtype:
                algorithm.balance(gradients, scales, total, scratch[0])
                continue
            length = BLOCK if chunk.on_host else _length(chunk, 2)
            for piece in _pieces(total, length // chunk.block):
                _balance([row[piece] for row in gradients], _cut_at(piece, scales), total[piece])
        return shown, now.flags

    def follow_edits(self, pending: ShownGradients, *, goes_on: bool) -> None:
        """Let the terms' gradients follow what users have made of ``p.grad``. ``goes_on``: another batch follows."""
        shown = pending.shown
        if self.options.denominator == "sum" and not goes_on:
            return
        self._weighed = self._weighed or self._weigh(pending, self._prepare(pending))
        weighed = self._weighed.weighed
        for index in shown.changed:
            found = {name: gradients[index] for name, gradients in pending.gradients.items()}
            rows = {name: gradient for name, gradient in found.items() if gradient is not None}
            if weighed is None:
                rows[SUM].copy_(shown.gradient(index))
            else:
                scales = self.tables.by_parameter(weighed.scales)[self.tables.row_of[index]]
                columns = self.tables.constant([self.tables.terms.index(name) for name in rows], torch.int64)
                mine = scales[columns].to(shown.gradient(index).device)
                if share(shown, index, list(rows.values()), mine, algorithm.balance):
                    refuse_unbounded([self.tables.names[self.tables.row_of[index]]])
        if goes_on:
            for gradients in pending.gradients.values():
                if shown.factor is not None:
                    torch._foreach_mul_([one for one in gradients if one is not None], shown.factor)
            pending.norms = {name: norms_of(gradients) for name, gradients in pending.gradients.items()}

    def scales_of(self, pending: ShownGradients) -> Tensor:
        """What multiplies the terms' gradients that are pending, of a measured step: [L, I]."""
        self._weighed = self._weighed or self._weigh(pending, self._prepare(pending))
        assert self._weighed.weighed is not None
        return self._weighed.weighed.scales

    def observe(self, pending: ShownGradients, watch: FiniteWatch) -> tuple[Tensor, Tensor | None]:
        """The norms of the gradients, [P, I], which must be finite: ``None``, or a flag if the host cannot know yet."""
        if self._weighed is None:  # the updater is new since
            self._weighed = self._weigh(pending, self._prepare(pending))
        norms = self._weighed.observed
        return norms, watch.check(norms, self.tables.names, (SUM,) if pending.light else self.tables.terms)

    def balance(self, pending: ShownGradients, norms: Tensor, finite: Tensor | None) -> tuple[Tensor, Coefficients]:
        """Let norms, scales and clocks see the step; what cannot be compiled raises before.

        Gives what multiplies the terms' gradients, [L, I], and the coefficients of all parameters.
        """
        assert self._weighed is not None
        (_, touched, weighed), self._weighed, tables = self._weighed, None, self.tables
        self.follow_groups(finite=finite)
        self._shown, self._now = pending.shown.memory, self._prepare(pending)
        self._jobs = self._find_jobs()
        if weighed is not None and self._now.touched is not touched:  # some gradients were taken away
            weighed = self._steps.weighed(norms, self._now.touched, self._now.present)
        if weighed is None:
            scales = tables.frozen_scales
            coefficients = self._steps.light(norms, self._now.touched, scales, finite)
        else:
            scales = weighed.scales
            coefficients = self._steps.measured(norms, self._now.touched, weighed, finite)
            tables.freeze(None if self.options.compile else scales)  # compiled, the last digit may be another
        factor = pending.shown.factor
        if factor is None:
            return scales, coefficients
        shortened = None if coefficients.scales is None else coefficients.scales * factor
        return scales * factor, coefficients._replace(scales=shortened)

    def run(self, coefficients: Coefficients) -> None:
        """Update moments and parameters."""
        # To gather elements between updates, which flush the cache, would take longer; but what is scattered is copied.
        early = [None if update is None else chunk.gathered() for chunk, update in self._jobs]
        for (chunk, update), held, local in zip(self._jobs, early, self._now.chunks.local(coefficients), strict=True):
            if update is None:
                self._use_up(chunk, local)
                continue
            flat, scratch = chunk.copied() if held is None else held, self.scratch(chunk, chunk.dtype)
            moments, numbers = chunk.moment_rows, self.numbers_at(chunk)
            rows = () if self.options.denominator == "sum" else chunk.gradient_rows  # as far as they are looked at
            update(flat, chunk.row_in(self._shown), rows, moments, local, numbers, scratch)
            if held is None:
                chunk.put_back(flat)
        for (chunk, _), held in zip(self._jobs, early, strict=True):
            if held is not None and (chunk.packed or chunk.block > 1):
                chunk.put_back(held)
        self._shown = None  # it would take the place of the next

    def follow_groups(self, finite: Tensor | None = None) -> None:
        """Take the numbers of the groups as they are now. ``finite``: as of :meth:`observe`."""
        self.tables.follow_groups()
        skipped, denominator = None if finite is None else ~finite, self.options.denominator
        groups = self.tables.distinct
        self._numbers = {id(group): Numbers.of(group, denominator, skipped) for group in groups}
        self._flags = {} if skipped is None else {device: skipped.to(device) for device in self.tables.devices}

    def numbers_at(self, chunk: Chunk) -> Numbers:
        """The numbers of the chunk's group."""
        numbers: Numbers = self._numbers[id(chunk.group)]._replace(skipped=self._flags.get(chunk.device))
        return numbers

    def scratch(self, chunk: Chunk, dtype: torch.dtype) -> Tensor | None:
        """Memory [2, b] for results; fresh memory for every chunk would cost more than what is done with it."""
        if (self.options.compile and chunk.size > 1) or not chunk.on_host:
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
            self._kept[key] = self._cut(wholes, wanted, lambda one: BLOCK if one.on_host else _length(one, 4))
        return self._kept[key]

    def _cut(self, wholes: Iterable[Chunk], wanted: Sequence[bool], limit: Callable[[Chunk], int]) -> Chunks:
        """The parts over the parameters that are wanted, of up to ``limit`` elements."""
        rows = self.tables.row_of
        return Chunks((part for whole in wholes for part in whole.runs(wanted, rows, limit(whole))), self.tables.device)

    def _weigh(self, pending: ShownGradients, now: _Prepared) -> _Looked:
        """The norms of the gradients and what follows; nothing from those of a sum."""
        self.tables.follow_groups()
        norms = self.tables.observe(pending, (SUM,) if pending.light else self.tables.terms)
        weighed = None if pending.light else self._steps.weighed(norms, now.touched, now.present)
        return _Looked(norms, now.touched, weighed)

    def _prepare(self, pending: ShownGradients) -> _Prepared:
        """Find the chunks over the parameters that have gradients, unless they are as before."""
        memory, tables, touched = pending.memory, self.tables, pending.touched
        assert memory is not None
        key = memory, memory.active, tuple(touched), tuple(pending.gradients)
        if key not in self._prepared:
            if len(self._prepared) > 8 or any(kept.memory is not memory for kept in self._prepared.values()):
                self._prepared.clear()
            wholes, compiled = self._wholes(memory), self.options.compile
            chunks = self._cut(wholes, touched, lambda one: BLOCK if one.on_host and not compiled else WHOLE)
            flags = tables.constant([touched[member] for member in tables.members], torch.bool)[:, None]
            present = tables.constant([term in pending.gradients for term in tables.terms], torch.bool)
            self._prepared[key] = _Prepared(memory, chunks, touched, flags, present, {})
        return self._prepared[key]

    def _find_jobs(self) -> list[tuple[Chunk, Callable[..., None] | None]]:
        """What updates each chunk, unless numbers are of other kinds than before."""
        kinds = [(one.no_eps, one.decay is None, one.skipped is None, one.eps) for one in self._numbers.values()]
        key, jobs = (tuple(kinds), torch.get_num_threads()), self._now.jobs
        if key not in jobs:
            jobs[key] = [(chunk, self._update_of(chunk)) for chunk in self._now.chunks]
        return jobs[key]

    def _update_of(self, chunk: Chunk) -> Callable[..., None] | None:
        """What updates the chunk; ``None``: the gradients' own memory serves for results."""
        faster = accelerate.faster(chunk, self.numbers_at(chunk), self.options)
        if faster is not None or chunk.on_host:
            return faster or algorithm.update
        many = 3 * len(chunk.gradient_rows) + 4
        return (
            partial(_update_in_pieces, _length(chunk, many)) if _is_narrow(chunk) or chunk.moment_rows.largest else None
        )

    def _use_up(self, chunk: Chunk, local: Coefficients) -> None:
        """Update a chunk of an accelerator, where kernels are few and large: memory for results would be so, too."""
        rows, moments, numbers = chunk.gradient_rows, chunk.moment_rows, self.numbers_at(chunk)
        for term, row in enumerate(() if self.options.denominator == "sum" else rows):
            algorithm.absorb(term, algorithm.scaled(term, row, local, numbers, row), moments, local, numbers)
        held = chunk.gathered()
        flat = chunk.copied() if held is None else held
        algorithm.move(flat, chunk.row_in(self._shown), moments, local, numbers, rows[0])
        chunk.put_back(flat)
        self._now.memory.used_up = True

    def _wholes(self, memory: GradientMemory) -> Iterator[Chunk]:
        """A chunk for each pack of the memory."""
        self.joined = True
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


def _balance(gradients: algorithm.Rows, scales: Tensor, total: Tensor) -> None:
    """The balanced gradient; a narrow dtype saturates, unless a gradient is not finite."""
    if total.dtype == scales.dtype:
        algorithm.balance(gradients, scales, total)
        return
    most, wide = torch.finfo(total.dtype).max, torch.empty_like(total, dtype=scales.dtype)
    total.copy_(algorithm.balance(gradients, scales, wide).clamp_(-most, most))


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
    total: Tensor,
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
        rows = [row[piece] for row in gradients]
        algorithm.update(parameter[piece], total[piece], rows, mine, theirs, numbers, None)
