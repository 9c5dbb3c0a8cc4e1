"""Consumes each term's gradient as soon as it is there, so that never more than one is held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam import balancing
from lightning_mtadam.collect import Batch
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.collect.norms import norm_table, norms_of
from lightning_mtadam.collect.pending import next_gradients
from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim import algorithm
from lightning_mtadam.optim.chunks import Chunk, Coefficients, Moments
from lightning_mtadam.optim.update import Updater
from lightning_mtadam.terms import Gradients, check_reached, non_finite


class LowMemory:
    """A step in another order: each term's norms, scales and second moments, then all the rest.

    The anchor comes first, so that the scales of a term are known when its gradient is. At a layer that the anchor
    does not reach, they depend on all terms: there the gradients wait. So the anchor is one term, "unit" or ``None``.
    """

    def __init__(self, updater: Updater) -> None:
        self.updater, self.tables = updater, updater.tables
        self._anchor: Any = balancing.reference_of(self.tables.options.anchor, self.tables.terms)
        self._sums: list[Tensor | None] = [None] * len(self.tables.parameters)  # the balanced gradient
        self._observed: dict[str, Tensor] = {}
        self._consumed: set[tuple[int, int]] = set()
        self._late: dict[int, Gradients] = {}

    def absorb_all(self, batch: Batch, memory: GradientMemory | None) -> None:
        """Differentiate and consume the terms, the anchor first; ``p.grad`` is then the balanced gradient.

        ``memory`` is for one term's gradients, while they are averaged. Gradients that are not finite raise.
        """
        names = sorted(batch.losses, key=lambda name: name != self.tables.terms[self._anchor])  # else as they are
        batch = replace(batch, losses={name: batch.losses[name] for name in names})
        found = batch.gradients()
        try:
            for name in names:
                self._absorb(name, _averaged(next_gradients(found, name, batch), name, batch, memory))
            next(found, None)
        finally:
            found.close()
        for column, gradients in self._late.items():
            self._consume(column, gradients)
        for parameter, total in zip(self.tables.parameters, self._sums, strict=True):
            parameter.grad = None if total is None else sharding.like(total, parameter)

    def observe(self, *_: object) -> tuple[Tensor, None]:
        """As of ``Updater``: they were seen already."""
        zero = torch.zeros_like(self.tables.norms[:, 0])
        return torch.stack([self._observed.get(term, zero) for term in self.tables.terms], 1), None

    def balance(self, _: object, norms: Tensor, finite: None) -> tuple[Tensor, Coefficients]:
        """As of ``Updater``."""
        touched = self.tables.constant([self._sums[member] is not None for member in self.tables.members], torch.bool)
        return self.tables.measured(norms, touched[:, None], self._present(), finite)

    def run(self, coefficients: Coefficients) -> None:
        """Update first moments and parameters."""
        terms, numbers, chunks = self.tables.terms, self.updater.numbers_of(), self.updater.chunks_of_one
        for chunk, local in zip(chunks, chunks.local(coefficients), strict=True):
            (member,) = chunk.members
            total = _piece(chunk, self._sums[member])
            if total is None:
                continue
            moments, gathered = chunk.moment_rows.widened(local.scales.dtype), chunk.gathered()
            flat = chunk.copied() if gathered is None else gathered
            if self.tables.options.denominator != "sum":
                for column in set(range(len(terms))) - {at for at, reached in self._consumed if reached == member}:
                    algorithm.forget(column, moments, local)
            algorithm.move(flat, total.to(local.scales.dtype), moments, local, numbers[id(chunk.group)])
            chunk.moment_rows.keep(moments)
            chunk.put_back(flat)

    def _absorb(self, term: str, gradients: Gradients) -> None:
        tables, column = self.tables, self.tables.terms.index(term)
        norms = norms_of([gradients[member] for member in tables.members])
        columns = [norms if other == term else [None] * len(norms) for other in tables.terms]
        observed = sharding.join_rows(norm_table(columns, tables.norms), tables.shardings)
        if not bool(observed.isfinite().all()):
            left = "The parameters were not changed, but second moments have seen the terms before it."
            raise non_finite(observed, tables.names, tables.terms, left)
        self._observed[term] = observed[:, column]
        pairs = list(zip(gradients, self._ready(), strict=True))
        self._late[column] = [None if gradient is None or now else gradient.clone() for gradient, now in pairs]
        self._consume(column, [gradient if now else None for gradient, now in pairs])

    def _present(self) -> Tensor:
        return self.tables.constant([term in self._observed for term in self.tables.terms], torch.bool)

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Norms and counts after this step, at the layers that the last term reaches: [L, I] each."""
        everywhere = self.tables.constant([True] * len(self.tables.members), torch.bool)[:, None]
        return self.tables.averaged(self.observe()[0], everywhere, self._present())

    def _ready(self) -> list[bool]:
        """Per parameter, whether scales there depend on no term that is still to come: where the anchor has reached."""
        tables, flags = self.tables, [True] * len(self.tables.parameters)
        if tables.options.anchor not in (None, "unit"):
            reached = tables.by_parameter(self._norms()[0])[:, self._anchor] > 0
            for member, flag in zip(tables.members, reached.tolist(), strict=True):
                flags[member] = flag
        return flags

    def _consume(self, column: int, gradients: Gradients) -> None:
        tables, numbers, chunks = self.tables, self.updater.numbers_of(), self.updater.chunks_of_one
        scales = tables.by_parameter(tables.scales(*self._norms()))[:, column, None]
        reaching = torch.zeros_like(tables.norms, dtype=torch.bool)
        reaching[:, column] = self._observed[tables.terms[column]] > 0
        clocks = balancing.tick(tables.clocks, reaching, torch.ones_like(reaching[:, :1]))
        weights = tables.weights(clocks[:, 1 + column, None])
        for member, gradient in enumerate(gradients):  # also of those that have no chunk, being empty on this process
            if gradient is not None and self._sums[member] is None:
                self._sums[member] = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
        for chunk, scale, weight in zip(chunks, chunks.spread(scales), chunks.spread(weights), strict=True):
            (member,) = chunk.members
            gradient, total = _piece(chunk, gradients[member]), _piece(chunk, self._sums[member])
            if gradient is None or total is None:
                continue
            squares = () if tables.options.denominator == "sum" else chunk.moment_rows.second[column : column + 1]
            kept, scratch = Moments((), squares), self.updater.scratch(chunk, scale.dtype)
            moments, local = kept.widened(scale.dtype), Coefficients(scale, weight, scale, None, None)
            spare = None if scratch is None else scratch[1]
            algorithm.absorb(0, gradient, total, moments, local, numbers[id(chunk.group)], spare)
            kept.keep(moments)
            self._consumed.add((column, member))


def _piece(chunk: Chunk, whole: Tensor | None) -> Tensor | None:
    """The chunk's elements of a tensor of its parameter's shape; a view where that is contiguous."""
    return None if whole is None else whole.reshape(-1)[chunk.start : chunk.start + chunk.size]


def _averaged(gradients: Gradients, name: str, batch: Batch, memory: GradientMemory | None) -> Gradients:
    """A term's gradients, averaged over the processes where they average."""
    averaging = batch.averaging()
    if averaging is None or memory is None:
        return gradients
    views = memory.views[0]
    for view, gradient in zip(views, gradients, strict=True):
        if view is not None and gradient is not None:
            view.copy_(gradient)
    memory.send(0, gradients, averaging)
    averaged = [view if flag else None for view, flag in zip(views, averaging.receive()[0], strict=True)]
    check_reached(name, averaged)
    memory.wrote(0, averaged)
    return averaged
