"""The small numbers of all parameters as tables: norms, scales, clocks, and the coefficients of the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mtadam import balancing, importance
from lightning_mtadam.balancing import norm_table, norms_of, wide_dtype
from lightning_mtadam.collect.pending import PendingGradients
from lightning_mtadam.constants import constant
from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim.chunks import Coefficients
from lightning_mtadam.optim.layers import Layers
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.schedule import decay_of_norms
from lightning_mtadam.optim.state import BALANCE_KEYS, State


class Weighed(NamedTuple):
    """What the gradients of a step make of the norms, and of the scales: [L, I] each."""

    norms: Tensor
    counts: Tensor
    scales: Tensor


class Tables:
    """The tables of ``P`` parameters that have a state, in ``L`` layers, with ``I`` terms, kept across steps.

    ``clocks`` [P, 1 + I], ``norms``, ``counts``, ``log_scales``, ``log_scale_counts`` [P, I] are the ``BALANCE_KEYS``
    of the states, which hold the rows. ``members`` are the indices of those parameters, ``row_of`` their rows.
    """

    def __init__(
        self,
        options: Options,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, State],
        layers: Layers,
        names: Sequence[str],
        terms: tuple[str, ...],
    ) -> None:
        self.options, self.layers, self.terms, self.moments = options, layers, terms, options.moments(len(terms))
        owners = [(parameter, group) for group in groups for parameter in group["params"]]
        self.parameters = [parameter for parameter, _ in owners]
        self.members = [index for index, (parameter, _) in enumerate(owners) if state.get(parameter)]
        self.row_of = {member: row for row, member in enumerate(self.members)}
        mine = [self.parameters[member] for member in self.members]
        self.states, self.groups = [state[p] for p in mine], [owners[member][1] for member in self.members]
        self.names, self.shardings = [names[member] for member in self.members], list(map(sharding.sharding_of, mine))
        self.distinct = list({id(group): group for group in self.groups}.values())
        self.dtype, self.device = wide_dtype(mine), mine[0].device
        self.keys = [None if hasattr(p, "to_local") else id(group) for p, group in owners]  # what share a pack
        self.devices = list(dict.fromkeys(parameter.device for parameter in mine))
        self._uniform = all(p.device == self.device and wide_dtype([p]) == self.dtype for p in mine)
        joined = [self._join(key) for key in BALANCE_KEYS]
        self.clocks, self.norms, self.counts, self.log_scales, self.log_scale_counts = joined
        self._every = len(mine) == len(owners)
        self._own_layers = self._every and len(layers.names) == len(owners)
        self._layer_of = layers.layer_of.to(self.device)
        if not self._every:
            self._layer_of = self._layer_of[self.constant(self.members, torch.int64)]
        self._quadratic = options.averages_squares
        self._amsgrad = any("max_exp_avg_sq" in one for one in self.states)
        self._betas: list[tuple[float, ...]] = []
        self.follow_importance()
        self.follow_groups()

    def constant(self, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        """A constant beside the tables."""
        return constant(values, dtype or self.dtype, self.device)

    def follow_groups(self) -> None:
        """Take the betas of the groups, which schedules may have changed."""
        betas = [tuple(map(float, group["betas"])) for group in self.distinct]
        if betas != self._betas:
            self._betas = betas
            beta1, beta2, beta3 = zip(*[map(float, group["betas"]) for group in self.groups], strict=True)
            self._log_beta1, self._log_beta2 = self._column(beta1, torch.log), self._column(beta2, torch.log)
            self._share2 = self._column(beta2, lambda beta: 1 - beta)
            decay = self._column([decay_of_norms(beta, self.options.balance_every) for beta in beta3])
            self._beta3 = decay if decay.dim() == 0 else self._by_layer(decay)  # the largest of those of a layer

    def follow_importance(self) -> None:
        """Take the importance of the options, which has changed; the scales of light steps follow."""
        self._importance = importance.table(self.options.importance, self.terms, self.norms)
        silent = 0 in [self.options.importance.get(term) for term in self.terms]
        self._silent = self._importance == 0 if silent else None
        self._frozen: Tensor | None = None

    def observe(self, pending: PendingGradients, rows: Sequence[str]) -> Tensor:
        """The L2 norms of the gradients, zero where there is none: [P, I]   (Alg. 1, line 7)."""
        columns = []
        for name in rows:
            norms = pending.norms.get(name) or norms_of(pending.gradients.get(name) or [None] * len(self.parameters))
            columns.append(norms if self._every else [norms[member] for member in self.members])
        table = norm_table(columns, self.norms, uniform=self._uniform)
        return sharding.join_rows(table, self.shardings) if any(self.shardings) else table

    def weighed(self, observed: Tensor, touched: Tensor, present: Tensor) -> Weighed:
        """The norms after a step with the gradients of every term, and the scales by them   (Alg. 1, lines 7 and 8).

        ``observed`` [P, I] are the norms of the gradients, ``touched`` [P, 1] whether any term's graph reached the
        parameter, ``present`` [I] whether the term is in this step's losses. The tables are as before.
        """
        norms, counts = self.averaged(observed, touched, present)
        return Weighed(norms, counts, self.scales(norms, counts))

    def measured(self, observed: Tensor, touched: Tensor, weighed: Weighed, finite: Tensor | None) -> Coefficients:
        """Let the tables see that step, unless ``finite`` is false; gives the coefficients of all parameters."""
        changes = [(self.norms, self.by_parameter(weighed.norms)), (self.counts, self.by_parameter(weighed.counts))]
        changes.append((self.clocks, balancing.tick(self.clocks, self.reaching(observed, weighed.scales), touched)))
        for kept, moved in changes:
            kept.copy_(moved if finite is None else torch.where(finite, moved, kept))
        scales = weighed.scales if finite is None else torch.where(finite, weighed.scales, 0)
        return self._coefficients(scales, finite)

    def light(self, observed: Tensor, touched: Tensor, frozen: Tensor, finite: Tensor | None) -> Coefficients:
        """As ``measured``, with the gradient of one sum of the terms, times their ``frozen`` scales."""
        clocks = balancing.tick(self.clocks, torch.zeros_like(observed, dtype=torch.bool), touched)
        self.clocks.copy_(clocks if finite is None else torch.where(finite, clocks, self.clocks))
        return self._coefficients(frozen, finite)

    def averaged(self, observed: Tensor, touched: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """The layers' norms and counts after a step, [L, I] each; the arguments are those of ``measured``."""
        if not self._own_layers:
            touched = self._by_layer(touched.to(self.dtype)) > 0
            observed = balancing.layer_norms(observed, self._layer_of, len(self.layers.names))
        norms, counts = self.norms_by_layer()
        moving, rule = touched & present, self.options.norm_init
        return balancing.update_norms(norms, counts, observed, moving, self._beta3, rule, quadratic=self._quadratic)

    def scales(self, norms: Tensor, counts: Tensor) -> Tensor:
        """What multiplies each term's gradient: [L, I], from norms and counts of that shape."""
        norms = self._told_apart(norms, counts)[0]
        target = balancing.target_norms(norms, self.options.anchor, self.terms)
        return balancing.balance_scales(norms, target, self._importance, self.options.max_scale)

    def reaching(self, observed: Tensor, scales: Tensor) -> Tensor:
        """Where a term's own clock begins: its gradient is neither zero nor left out. [P, I], [L, I] -> [P, I]."""
        return (observed > 0) & self.by_parameter(scales > 0 if self._silent is None else (scales > 0) | self._silent)

    def settled(self, norms: Tensor, counts: Tensor, anchor: int | None) -> Tensor:
        """Where a term's scale depends on no other but the ``anchor``, if there is one: [L, I] bool."""
        _, _, faint, clear = self._told_apart(norms, counts)
        if anchor is None:
            return ~faint
        at = slice(anchor, anchor + 1)
        return (norms[:, at] > 0) & ~faint[:, at] & (~faint | clear[:, at])

    def weights(self, clocks: Tensor, correction: Tensor | None = None) -> Tensor:
        """``w = (1 - beta2) / (1 - beta2^clock)``, zero where the clock has not started: [P, k] -> [P, k]."""
        if correction is None:
            correction = balancing.bias_correction(clocks, self._log_beta2)
        return torch.where(clocks > 0, self._share2 / correction, 0)

    @property
    def frozen_scales(self) -> Tensor:
        """The scales of the last measured step, [L, I]; after a checkpoint from the tables, which gives the same."""
        if self._frozen is None:
            self.follow_groups()
            self._frozen = self.scales(*self.norms_by_layer())
        return self._frozen

    def freeze(self, scales: Tensor | None) -> None:
        """Keep the scales of a measured step; ``None``: those that the tables give."""
        self._frozen = scales

    def corrected_norms(self, *, heard: bool = False) -> Tensor:
        """The gradient norms n_i: [L, I]; if only those that are ``heard``, zero where they are noise."""
        self.follow_groups()
        return self._told_apart(*self.norms_by_layer())[0 if heard else 1]

    def average_scales(self) -> Tensor:
        """The mean scales so far, [L, I], float64 on the host: nan where never reached, zero where importance is."""
        found = (self.log_scales, self.log_scale_counts, self._layer_of, self.norms_by_layer()[1])
        logs, counts, layer_of, reached = (tensor.to("cpu") for tensor in found)
        averages = balancing.average_scales(logs.double(), counts.double(), layer_of, len(self.layers.names))
        averages[:, [self.options.importance.get(term, 1) == 0 for term in self.terms]] = 0
        return torch.where(reached > 0, averages, nan)

    def norms_by_layer(self) -> tuple[Tensor, Tensor]:
        """The moving averages of the layers' norms, and how many norms they average: [L, I] each."""
        if self._own_layers:
            return self.norms, self.counts
        return self._by_layer(self.norms), self._by_layer(self.counts)

    def by_parameter(self, rows: Tensor) -> Tensor:
        """Give each parameter the row of its layer: [L, k] -> [P, k]."""
        return rows if self._own_layers else rows[self._layer_of]

    def _coefficients(self, scales: Tensor, finite: Tensor | None) -> Coefficients:
        """The coefficients of all parameters, from scales [L, I] or [L, 1] and the clocks   (Alg. 1, lines 11, 12)."""
        spread = self.by_parameter(scales)
        balancing.record_scales(self.log_scales, self.log_scale_counts, spread, finite)
        shared, own, denominator = self.clocks[:, :1], self.clocks[:, 1:], self.options.denominator
        squares = shared if denominator == "sum" else own
        correction = balancing.bias_correction(squares, self._log_beta2)
        weights = self.weights(squares, correction)
        first = balancing.bias_correction(own if denominator == "own" else shared, self._log_beta1)
        factor = first * (self.moments[0] / self.moments[1])
        reaching: Tensor | None = None
        if "mean" in (denominator, self.options.update):
            reaching = (own > 0).sum(1, keepdim=True).clamp(min=1).to(scales)
        if reaching is not None and self.options.update == "mean":
            factor = factor * reaching
        if finite is not None:
            weights, factor = torch.where(finite, weights, 0), torch.where(finite, factor, torch.inf)
        return Coefficients(
            scales=None if denominator == "sum" else spread,
            weights=weights,
            factor=factor,
            reaching=reaching if denominator == "mean" else None,
            correction=correction if self._amsgrad else None,
        )

    def _by_layer(self, rows: Tensor) -> Tensor:
        return balancing.by_layer(rows, self._layer_of, len(self.layers.names))

    def _told_apart(self, norms: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The norms n_i, zero where they are noise and left out; all of them; which are faint, which clear: [L, I]."""
        rule = self.options.norm_init
        found = seen = balancing.corrected_norms(norms, counts, self._beta3, rule, quadratic=self._quadratic)
        if rule == "one":
            seen = balancing.without_start(found, counts, self._beta3)
        noise, faint, clear = balancing.loudness(seen, self._silent)
        return found if self.options.anchor is None else found.masked_fill(noise, 0), found, faint, clear

    def _column(self, values: Sequence[float], compute: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """What is computed of each parameter's number: a scalar on the host where all are the same, else [P, 1]."""
        found = {value: compute(torch.tensor(value, dtype=torch.float64, device="cpu")) for value in set(values)}
        if len(found) == 1:
            return found[values[0]]
        return torch.stack([found[value] for value in values])[:, None].to(self.device, self.dtype)

    def _join(self, key: str) -> Tensor:
        joined = torch.stack([state[key].to(self.device, self.dtype) for state in self.states])
        for state, row in zip(self.states, joined.unbind(), strict=True):
            state[key] = row
        return joined
