"""Consumes each term's gradient as soon as it is there, so that never more than one is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam import balancing
from lightning_mtadam.balancing import norm_table, norms_of
from lightning_mtadam.collect import Batch
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.collect.pending import next_gradients
from lightning_mtadam.distributed import sharding
from lightning_mtadam.finite import FiniteWatch
from lightning_mtadam.optim import algorithm
from lightning_mtadam.optim.chunks import Coefficients, Moments
from lightning_mtadam.optim.tables import Averages
from lightning_mtadam.optim.update import Updater
from lightning_mtadam.terms import Gradients, check_reached, is_host, non_finite


class LowMemory:
    """A step in another order: each term's norms, scales and second moments, then all the rest.

    The anchor comes first, so that the scales of a term are known when its gradient is. At a layer that the anchor
    does not reach, or where a term is so faint that it may be noise, they depend on all terms: there the gradients
    wait. So the anchor is one term, "unit" or ``None``.
    """

    def __init__(self, updater: Updater, watch: FiniteWatch) -> None:
        self.updater, self.tables, self.watch = updater, updater.tables, watch
        self._anchor: Any = balancing.reference_of(self.tables.options.anchor, self.tables.terms)
        parts = list(map(sharding.local, self.tables.parameters))
        flags = [member in self.tables.row_of for member in range(len(parts))]
        self.sums = GradientMemory(parts, flags, self.tables.keys, 1, apart=True)  # of the balanced gradients
        self._observed: dict[str, Tensor] = {}
        self._finite: Tensor | None = None  # on an accelerator, whether all gradients so far were
        self._reached = [[False] * len(parts) for _ in self.tables.terms]  # [I][P]
        self._late: dict[int, Gradients] = {}

    def absorb_all(self, batch: Batch, memory: GradientMemory | None) -> None:
        """Differentiate and consume the terms, the anchor first; ``sums`` are then the balanced gradients.

        ``memory`` is for one term's gradients, while they are averaged. Gradients that are not finite raise.
        """
        names = sorted(batch.losses, key=lambda name: name != self.tables.terms[self._anchor])  # else as they are
        batch = replace(batch, losses={name: batch.losses[name] for name in names})
        found = batch.gradients()
        try:
            for name in names:
                gradients = _averaged(next_gradients(found, name, batch), name, batch, memory)
                if gradients is not None:
                    self._absorb(name, gradients, name == names[-1])
                del gradients  # the next term's need the place
            next(found, None)
        finally:
            found.close()
        for column, gradients in self._late.items():
            self._consume(column, gradients)

    def observe(self, _: object, watch: FiniteWatch) -> tuple[Tensor, Tensor | None]:
        """As of ``Updater``. On the host it is known already that they are finite."""
        tables, norms = self.tables, self._norms_so_far()
        balances = tables.options.anchor is not None
        settled = self._settled(tables.averages()).flatten() if balances else None
        return norms, watch.check(norms, tables.names, tables.terms, settled)

    def balance(self, _: object, norms: Tensor, finite: Tensor | None) -> tuple[Tensor, Coefficients]:
        """As of ``Updater``."""
        self.updater.follow_groups(finite=finite)
        touched = self._touched()
        weighed = self.tables.weighed(norms, touched, self._present())
        return weighed.scales, self.tables.measured(norms, touched, weighed, finite)

    def scales_of(self, _: object) -> Tensor:
        """As of ``Updater``."""
        return self.tables.weighed(self._norms_so_far(), self._touched(), self._present()).scales

    def run(self, coefficients: Coefficients) -> None:
        """Update first moments and parameters."""
        if self.tables.options.denominator != "sum":
            for column, reached in enumerate(self._reached):
                missed = [here and not now for here, now in zip(self.touched, reached, strict=True)]
                self._forget(column, missed, coefficients)
        chunks = self.updater.chunks_like(self.sums, self.touched)
        for chunk, local in zip(chunks, chunks.local(coefficients), strict=True):
            moments, gathered = chunk.moment_rows.widened(chunk.dtype), chunk.gathered()
            flat = chunk.copied() if gathered is None else gathered
            total, scratch = chunk.row_in(self.sums), self.updater.scratch(chunk, chunk.dtype)
            spare = None if scratch is None else scratch[0]
            algorithm.move(flat, total, moments, local, self.updater.numbers_at(chunk), spare)
            chunk.moment_rows.keep(moments)
            chunk.put_back(flat)

    def drop(self, indices: Sequence[int]) -> None:
        """Leave some parameters alone; second moments must not have seen their gradients."""
        for reached in self._reached:
            for index in indices:
                reached[index] = False

    @property
    def touched(self) -> list[bool]:
        """Per parameter, whether any term reaches it."""
        return [any(flags) for flags in zip(*self._reached, strict=True)]

    def _absorb(self, term: str, gradients: Gradients, last: bool) -> None:
        tables, column = self.tables, self.tables.terms.index(term)
        norms = norms_of([gradients[member] for member in tables.members])
        columns = [norms if other == term else [None] * len(norms) for other in tables.terms]
        observed = sharding.join_rows(norm_table(columns, tables.norms), tables.shardings)
        finite = observed.isfinite().all()
        if not is_host(finite.device):
            self._finite = finite if self._finite is None else self._finite & finite
        elif not bool(finite):
            left = "The parameters were not changed, but second moments have seen the terms before it."
            raise non_finite(observed, tables.names, tables.terms, left)
        self._observed[term] = observed[:, column]
        pairs = list(zip(gradients, self._ready(column, last), strict=True))
        self._late[column] = [None if gradient is None or now else gradient.clone() for gradient, now in pairs]
        self._consume(column, [gradient if now else None for gradient, now in pairs])

    def _touched(self) -> Tensor:
        return self.tables.constant([self.touched[member] for member in self.tables.members], torch.bool)[:, None]

    def _present(self) -> Tensor:
        return self.tables.constant([term in self._observed for term in self.tables.terms], torch.bool)

    def _norms_so_far(self) -> Tensor:
        """The norms of this step's gradients, [P, I]; zero for terms that are still to come."""
        zero = torch.zeros_like(self.tables.norms[:, 0])
        return torch.stack([self._observed.get(term, zero) for term in self.tables.terms], 1)

    def _averages(self) -> Averages:
        """The averages of the norms, and their counts, after this step, at the layers that the last term reaches."""
        everywhere = self.tables.constant([True] * len(self.tables.members), torch.bool)[:, None]
        return self.tables.averaged(self._norms_so_far(), everywhere, self._present())

    def _ready(self, column: int, last: bool) -> list[bool]:
        """Per parameter, whether the scale of the term there depends on none that is still to come.

        The host does not wait for an accelerator to know: it is told of the step before the last, and keeps gradients
        until then. Averages move slowly: a term that has become noise since is judged by what is known of the others.
        """
        tables, flags = self.tables, [True] * len(self.tables.parameters)
        if last or tables.options.anchor is None:
            return flags
        settled, count = [False] * len(tables.members), len(tables.terms)
        if is_host(tables.device):
            settled = self._settled(self._averages())[:, column].tolist()
        elif len(self.watch.told) == count * len(settled) and all(group["betas"][2] > 0 for group in tables.distinct):
            settled = self.watch.told[column::count]
        for member, flag in zip(tables.members, settled, strict=True):
            flags[member] = flag
        return flags

    def _settled(self, averages: Averages) -> Tensor:  # [P, I]
        tables, anchor = self.tables, None if self.tables.options.anchor == "unit" else self._anchor
        return tables.by_parameter(tables.settled(averages, anchor))

    def _consume(self, column: int, gradients: Gradients) -> None:
        tables, updater, flags = self.tables, self.updater, [gradient is not None for gradient in gradients]
        if not any(flags):
            return
        updater.follow_groups(finite=self._finite)
        scales = tables.scales(self._averages())
        weights, scales = self._weights(column, scales), tables.by_parameter(scales)[:, column, None]
        chunks = self.updater.chunks_like(self.sums, flags)
        for chunk, scale, weight in zip(chunks, chunks.spread(scales), chunks.spread(weights), strict=True):
            gradient = chunk.elements_of([gradients[member] for member in chunk.members])
            squares = () if tables.options.denominator == "sum" else chunk.moment_rows.second[column : column + 1]
            kept, scratch = Moments((), squares), updater.scratch(chunk, chunk.dtype)
            moments, local = kept.widened(chunk.dtype), Coefficients(scale, weight, scale, None, None)
            spare, numbers = None if scratch is None else scratch[1], updater.numbers_at(chunk)
            balanced = algorithm.scaled(0, gradient, local, numbers, spare)
            chunk.row_in(self.sums).add_(balanced)
            if squares:
                algorithm.absorb(0, balanced, moments, local, numbers)
                kept.keep(moments)
        self._reached[column] = [before or now for before, now in zip(self._reached[column], flags, strict=True)]

    def _weights(self, column: int, scales: Tensor) -> Tensor:
        """The weights of a term's squares in their average after this step, [P, 1]; ``scales`` are [L, I]."""
        reaching = self.tables.reaching(self._norms_so_far(), scales)
        clocks = balancing.tick(self.tables.clocks, reaching, torch.ones_like(reaching[:, :1]))
        return self.tables.weights(clocks[:, 1 + column, None])

    def _forget(self, column: int, flags: Sequence[bool], coefficients: Coefficients) -> None:
        """Let the second moments of a term see zeros at the parameters that it does not reach."""
        chunks = self.updater.chunks_like(self.sums, flags)
        for chunk, local in zip(chunks, chunks.local(coefficients), strict=True):
            kept = Moments((), chunk.moment_rows.second)
            moments = kept.widened(chunk.dtype)
            algorithm.forget(column, moments, local)
            kept.keep(moments)


def _averaged(gradients: Gradients, name: str, batch: Batch, memory: GradientMemory | None) -> Gradients | None:
    """A term's gradients, averaged over the processes where they average; ``None`` if it has no graph on any."""
    averaging = batch.averaging
    if averaging is None or memory is None:
        return gradients
    views = memory.views[0]
    found = [(view, new) for view, new in zip(views, gradients, strict=True) if view is not None and new is not None]
    if found:
        torch._foreach_copy_([view for view, _ in found], [new for _, new in found])
    memory.send(0, gradients, averaging)
    averaged = [view if flag else None for view, flag in zip(views, averaging.receive()[0], strict=True)]
    if name in averaging.absent:
        memory.wrote(0, None)
        return None
    check_reached(name, averaged)
    memory.wrote(0, averaged)
    return averaged
