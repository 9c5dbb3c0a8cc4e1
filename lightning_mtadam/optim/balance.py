"""The balance of the parameters that have a state: their norms, scales and clocks, as tables over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import nan
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam import balancing
from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim import average
from lightning_mtadam.optim.decays import Betas, Decays
from lightning_mtadam.optim.layers import Layers
from lightning_mtadam.optim.norms import norm_table
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.pending import Gradients
from lightning_mtadam.optim.schedule import decay_of_norms
from lightning_mtadam.optim.state import BalanceTable, State, balance_dtype


class Balance:
    """Norms, scales and clocks of ``P`` parameters in ``L`` layers, with ``I`` terms.

    Args:
        options: the optimizer's options.
        groups: the group of each parameter.
        states: the state of each parameter; its small entries become rows of tables.
        parameters: the parameters.
        layers: the layers of all the optimizer's parameters.
        members: which of those these are.
        terms: the names of the terms.
    """

    def __init__(
        self,
        options: Options,
        groups: Sequence[Mapping[str, Any]],
        states: Sequence[State],
        parameters: Sequence[Tensor],
        layers: Layers,
        members: Sequence[int],
        terms: tuple[str, ...],
    ) -> None:
        self.options, self.groups, self.terms, self.layers = options, groups, terms, layers
        self.dtype, self.device = balance_dtype(parameters), parameters[0].device
        self.shardings = [sharding.sharding_of(parameter) for parameter in parameters]
        self.distinct = list({id(group): group for group in groups}.values())
        self.uniform = all(p.device == self.device and balance_dtype([p]) == self.dtype for p in parameters)
        self.table = BalanceTable(states, self.dtype, self.device)
        self._decays: tuple[list[tuple[float, ...]], Decays] | None = None
        self.layer_of = layers.layer_of.to(self.device)
        self.single = len(members) == len(layers.layer_of) == len(layers.names)
        if len(members) < len(layers.layer_of):
            self.layer_of = self.layer_of[self.constant(members, torch.int64)]
        self._importance = self.constant([float(options.importance.get(term, 1)) for term in terms])

    def constant(self, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        """A constant beside the tables."""
        return _constant(tuple(values), dtype or self.dtype, self.device)

    def flags(self, values: Sequence[bool]) -> Tensor:
        """Booleans beside the tables, as a column: [P, 1]."""
        return self.constant(values, torch.bool)[:, None]

    def observe(self, gradients: Sequence[Gradients], known: Sequence[Sequence[Tensor | None] | None]) -> Tensor:
        """The L2 norms of the gradients, zero where there is none: I lists of P -> [P, I]   (Alg. 1).

        Args:
            gradients: of each term.
            known: of each term its norms, if they were taken already.
        """
        rows = norm_table(gradients, known, self.dtype, self.device, uniform=self.uniform)
        for cut in dict.fromkeys(self.shardings):  # in one order on all processes
            if cut is not None:
                index = self.constant([row for row, other in enumerate(self.shardings) if other == cut], torch.int64)
                rows[index] = sharding.join_norms(rows[index], cut)
        return rows

    def foresee(self, observed: Tensor, touched: Tensor, present: Tensor, decays: Decays) -> tuple[Tensor, Tensor]:
        """The layers' norms and counts as they are after this step: [L, I] each.

        Args:
            observed: [P, I].
            touched: [P, 1] bool, whether any term's graph reached the parameter.
            present: [I] bool, whether the term is in this step's losses.
            decays: of the groups.
        """
        if not self.single:
            touched = self._by_layer(touched.to(self.dtype)) > 0
        return balancing.update_norms(
            *self.norms(),
            observed if self.single else balancing.layer_norms(observed, self.layer_of, len(self.layers.names)),
            touched & present,
            decays.norms,
            self.options.norm_init,
            quadratic=self.options.seldom,
        )

    def average(
        self, observed: Tensor, touched: Tensor, present: Tensor, decays: Decays, finite: Tensor | None
    ) -> None:
        """Average the observed norms into the moving averages; ``finite``: whether they may change, ``None`` if so."""
        norms, counts = self.foresee(observed, touched, present, decays)
        for kept, moved in ((self.table.norms, norms), (self.table.counts, counts)):
            moved = moved if self.single else moved[self.layer_of]
            kept.copy_(moved if finite is None else torch.where(finite, moved, kept))

    def scales(self, decays: Decays) -> Tensor:
        """What multiplies each term's gradient: [L, I]   (Alg. 1)."""
        return self.scales_of(*self.norms(), decays)

    def scales_of(self, norms: Tensor, counts: Tensor, decays: Decays) -> Tensor:
        """The scales that follow from norms and counts: [L, I] each."""
        norms = self._correct(norms, counts, decays)
        return balancing.balance_scales(
            norms, self.options.target_norms(norms, self.terms), self._importance, self.options.max_scale
        )

    def record(self, scales: Tensor, finite: Tensor | None) -> None:
        """Let the scales [L, I], without clipping, enter their average; ``finite``: as of ``average``."""
        rows = scales if len(scales) == 1 else self.by_parameter(scales)
        average.record(self.table.log_scales, self.table.log_scale_counts, rows, finite)

    def average_scales(self) -> Tensor:
        """The geometric mean of the scales over the steps so far: [L, I], float64, on the host.

        It is nan where the term never reached the layer, and zero where its importance is.
        """
        found = (self.table.log_scales, self.table.log_scale_counts, self.layer_of, self.norms()[1])
        logs, counts, layer_of, reached = (tensor.to("cpu") for tensor in found)
        averages = average.average_by_layer(logs.double(), counts.double(), layer_of, len(self.layers.names))
        averages[:, [self.options.importance.get(term, 1) == 0 for term in self.terms]] = 0
        return torch.where(reached > 0, averages, nan)

    def tick(self, reaching: Tensor, touched: Tensor, finite: Tensor | None) -> None:
        """Advance the clocks: ``reaching`` is [P, I] bool, ``touched`` [P, 1] bool."""
        clocks = balancing.tick(self.table.clocks, reaching, touched)
        self.table.clocks.copy_(clocks if finite is None else torch.where(finite, clocks, self.table.clocks))

    def weights(self, clocks: Tensor, decays: Decays) -> Tensor:
        """``(1 - beta2) / (1 - beta2^clock)``, zero where the clock has not started: [P, k] -> [P, k]."""
        correction = self.correction(clocks, decays.second)
        return decays.second.rows(lambda beta: torch.where(clocks > 0, (1 - beta) / correction, 0))

    def correction(self, clocks: Tensor, betas: Betas) -> Tensor:
        """``1 - beta^clock`` with the betas of each parameter's group: [P, k] -> [P, k]."""
        return betas.rows(lambda beta: balancing.bias_correction(clocks, beta))

    def norms(self) -> tuple[Tensor, Tensor]:
        """The moving averages of the layers' norms, and how many norms they average: [L, I] each."""
        if self.single:
            return self.table.norms, self.table.counts
        return self._by_layer(self.table.norms), self._by_layer(self.table.counts)

    def corrected_norms(self) -> Tensor:
        """The gradient norms n_i as the balance uses them: [L, I]."""
        return self._correct(*self.norms(), self.decays())

    def _correct(self, norms: Tensor, counts: Tensor, decays: Decays) -> Tensor:
        quadratic = self.options.seldom
        return balancing.corrected_norms(norms, counts, decays.norms, self.options.norm_init, quadratic=quadratic)

    def decays(self) -> Decays:
        """The decays of the groups as they are now."""
        values = [tuple(group["betas"]) for group in self.distinct]
        if self._decays is None or self._decays[0] != values:
            self._decays = values, Decays(self._betas(0), self._betas(1), self._beta3())
        return self._decays[1]

    def _betas(self, which: int) -> Betas:
        first, *others = dict.fromkeys(float(group["betas"][which]) for group in self.distinct)
        rows = {beta: [float(group["betas"][which]) == beta for group in self.groups] for beta in others}
        return Betas(_number(first), tuple((_number(beta), self.flags(mine)) for beta, mine in rows.items()))

    def by_parameter(self, rows: Tensor) -> Tensor:
        """Give each parameter the row of its layer: [L, k] -> [P, k]."""
        return rows if self.single else rows[self.layer_of]

    def _by_layer(self, rows: Tensor) -> Tensor:
        return balancing.by_layer(rows, self.layer_of, len(self.layers.names))

    def _beta3(self) -> Tensor:
        """Scalar; or [L, 1] where groups differ: a layer that spans groups takes the largest."""
        decays = {
            id(group): decay_of_norms(float(group["betas"][2]), self.options.balance_every) for group in self.distinct
        }
        if len(set(decays.values())) == 1:
            return _number(next(iter(decays.values())))
        return self._by_layer(self.constant([decays[id(group)] for group in self.groups])[:, None])


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@lru_cache(maxsize=1024)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant on the device; kept, so that it travels there once."""
    return torch.tensor(values, dtype=dtype, device=device)
