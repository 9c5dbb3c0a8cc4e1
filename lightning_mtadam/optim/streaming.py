"""Consumes each term's gradient as soon as it is there, so that never more than one is held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mtadam import balancing
from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim import kernels
from lightning_mtadam.optim.blocks import Works
from lightning_mtadam.optim.decays import Decays
from lightning_mtadam.optim.finite import non_finite
from lightning_mtadam.optim.layout import BLOCK
from lightning_mtadam.optim.pending import Gradients
from lightning_mtadam.optim.step import Stepper


class Streaming:
    """The stages of a step in another order: each term's norms, scales and second moments, then all the rest.

    The anchor comes first, so that the scales of a term are known when its gradient is. At a layer that the anchor does
    not reach, they depend on all terms: there the gradients wait.

    Args:
        stepper: of this step; its anchor is one term, or "unit", or there is none.
    """

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self._sums: list[Tensor | None] = [None] * len(stepper.all)
        self._observed: dict[str, Tensor] = {}
        self._consumed: set[tuple[int, int]] = set()
        self._late: dict[int, list[Tensor | None]] = {}

    def absorb(self, term: str, gradients: Gradients) -> None:
        """Consume the gradients of a term.

        Args:
            term: its name.
            gradients: one per parameter of the optimizer.

        Raises:
            NonFiniteError: one is inf or nan. Parameters, first moments, norms and clocks are as they were; second
                moments have seen the terms before it.
        """
        column = self.stepper.terms.index(term)
        mine = self.stepper.of_members(gradients)
        absent = [None] * len(mine)
        columns = [mine if index == column else absent for index in range(len(self.stepper.terms))]
        observed = self.stepper.balance.observe(columns, [None] * len(columns))
        if not bool(observed.isfinite().all()):
            left = "The parameters were not changed, but second moments have seen the terms before it."
            raise non_finite(observed, self.stepper.names, self.stepper.terms, left)
        self._observed[term] = observed[:, column]
        ready = self._ready()
        pairs = list(zip(gradients, ready, strict=True))
        self._late[column] = [None if gradient is None or now else gradient.clone() for gradient, now in pairs]
        self._consume(column, [gradient if now else None for gradient, now in pairs])

    def absorb_late(self) -> None:
        """Consume what had to wait for the norms of all terms."""
        for column, gradients in self._late.items():
            self._consume(column, gradients)
        self._late.clear()

    def show_sum(self) -> None:
        """Set ``p.grad`` to the balanced gradient, the sum over the terms."""
        for parameter, total in zip(self.stepper.all, self._sums, strict=True):
            parameter.grad = None if total is None else sharding.like(total, parameter)

    def finish(self) -> Tensor:
        """Update norms, clocks, first moments and parameters.

        Returns:
            The scales, [L, I].
        """
        stepper, balance = self.stepper, self.stepper.balance
        reached = [total is not None for total in self._sums]
        touched = [reached[member] for member in stepper.members]
        scales, table = stepper.plan.measured(
            self._norms(), balance.flags(touched), self._present(), balance.decays(), None
        )
        numbers = stepper.hyperparameters(None, None)
        works = self._works(touched)
        for work, local in zip(works, works.local(table), strict=True):
            (member,) = work.block.members
            total = self._sums[member]
            assert total is not None
            missed = [(column, member) not in self._consumed for column in range(len(stepper.terms))]
            flat = work.elements()
            kernels.finish(
                flat,
                total.view(-1)[work.block.begin : work.block.end],
                work.moments,
                local,
                numbers[id(work.group)],
                torch.tensor(missed, device=flat.device)[:, None],
            )
            work.put_back(flat)
        return scales

    def _works(self, touched: Sequence[bool]) -> Works:
        return self.stepper.workshop.works(self.stepper.spans, touched, BLOCK // len(self.stepper.terms))

    def _norms(self) -> Tensor:
        """The norms so far: [P, I]."""
        zero = torch.zeros_like(self.stepper.balance.table.norms[:, 0])
        return torch.stack([self._observed.get(term, zero) for term in self.stepper.terms], 1)

    def _present(self) -> Tensor:
        return self.stepper.balance.constant([term in self._observed for term in self.stepper.terms], torch.bool)

    def _foreseen(self, decays: Decays) -> tuple[Tensor, Tensor]:
        """Norms and counts after this step, at the layers that the last term reaches: [L, I] each."""
        balance = self.stepper.balance
        return balance.foresee(
            self._norms(), balance.flags([True] * len(self.stepper.members)), self._present(), decays
        )

    def _ready(self) -> list[bool]:
        """Per parameter, whether scales there depend on no term that is still to come: where the anchor has reached."""
        stepper = self.stepper
        flags = [True] * len(stepper.all)
        if stepper.options.anchor not in (None, "unit"):
            reference = stepper.options.reference(stepper.terms)
            assert isinstance(reference, int)
            norms, _ = self._foreseen(stepper.balance.decays())
            reached = stepper.balance.by_parameter(norms)[:, reference] > 0
            for member, flag in zip(stepper.members, reached.tolist(), strict=True):
                flags[member] = flag
        return flags

    def _consume(self, column: int, gradients: Gradients) -> None:
        stepper, balance = self.stepper, self.stepper.balance
        decays = balance.decays()
        scales = balance.by_parameter(balance.scales_of(*self._foreseen(decays), decays))
        reaching = torch.zeros_like(balance.table.norms, dtype=torch.bool)
        reaching[:, column] = self._observed[stepper.terms[column]] > 0
        clocks = balancing.tick(balance.table.clocks, reaching, torch.ones_like(reaching[:, :1]))
        weights = balance.weights(clocks[:, 1 + column, None], decays)
        for member, gradient in enumerate(gradients):  # also of those that have no block, being empty on this process
            if gradient is not None and self._sums[member] is None:
                self._sums[member] = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
        for work in self._works([gradient is not None for gradient in stepper.of_members(gradients)]):
            (member,) = work.block.members
            gradient, total, row = gradients[member], self._sums[member], stepper.row[member]
            assert gradient is not None
            assert total is not None
            cut = slice(work.block.begin, work.block.end)
            piece = gradient.reshape(-1)[cut]
            kernels.absorb(
                total.view(-1)[cut],
                piece,
                None if stepper.options.denominator == "sum" else work.moments.exp_avg_sq[column],
                scales[row, column].to(piece.device),
                weights[row].to(piece.device),
                stepper.scratch_for(piece, 1)[0],
            )
            self._consumed.add((column, member))
