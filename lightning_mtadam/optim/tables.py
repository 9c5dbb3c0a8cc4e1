"""The small numbers of all parameters as tables: norms, scales, clocks, and the coefficients of the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mtadam import balancing, importance, meetings
from lightning_mtadam.balancing import norm_table, norms_of, wide_dtype
from lightning_mtadam.collect.pending import PendingGradients
from lightning_mtadam.constants import constant
from lightning_mtadam.distributed import sharding
from lightning_mtadam.layers import Layers
from lightning_mtadam.optim.chunks import Coefficients
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.state import BALANCE_KEYS, SHARES, State
from lightning_mtadam.schedule import decay_of_norms


class Averages(NamedTuple):
    """The moving averages of the layers' norms."""

    norms: Tensor  # [L, I]
    counts: Tensor  # how many norms they average, [L, I]
    shares: Tensor | None  # of the parameters in the squares of their layers' norms, [P, I]; None: each is a layer


class Weighed(NamedTuple):
    """What the gradients of a step make of the averages, and of the scales, [L, I]."""

    averages: Averages
    scales: Tensor


class Told(NamedTuple):
    """What the averages tell; of terms that reach, and are not noise that is left out."""

    norms: Tensor  # n_i of the layers, zero where a term is nowhere heard: [L, I]
    counted: Tensor  # the same, zero also for the terms without influence, which no mean takes in
    shares: Tensor | None  # as of the averages, zero where a term is not heard
    faint: Tensor  # where it may be noise: bool, [P, I], or [L, I] where there are no shares
    clear: Tensor  # where it is not


class Tables:
    """The tables of ``P`` parameters that have a state, in ``L`` layers, with ``I`` terms, kept across steps.

    ``clocks`` [P, 1 + I], ``norms``, ``counts``, ``log_scales``, ``log_scale_counts`` [P, I] are the ``BALANCE_KEYS``
    of the states, which hold the rows; so are ``shares``, if layers have several parameters. ``members`` are the
    indices of those parameters, ``row_of`` their rows.
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
        self.shares = self._join(SHARES) if options.shares_layers else None
        self._every = len(mine) == len(owners)
        self._own_layers = self._every and len(layers.names) == len(owners)
        self._layer_of = layers.layer_of.to(self.device)
        if not self._every:
            self._layer_of = self._layer_of[self.constant(self.members, torch.int64)]
        self._reference = balancing.reference_of(options.anchor, terms)
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
        self._silent: Tensor | None = self._importance == 0 if silent else None
        self._left_out: Tensor | None = self._importance == 0 if silent else None
        if self._left_out is not None and isinstance(self._reference, int):  # an anchor's magnitude counts all the same
            self._left_out[self._reference].fill_(False)
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
        averages = self.averaged(observed, touched, present)
        return Weighed(averages, self.scales(averages))

    def measured(self, observed: Tensor, touched: Tensor, weighed: Weighed, finite: Tensor | None) -> Coefficients:
        """Let the tables see that step, unless ``finite`` is false; gives the coefficients of all parameters."""
        norms, counts, shares = weighed.averages
        changes = [(self.norms, self.by_parameter(norms)), (self.counts, self.by_parameter(counts))]
        if self.shares is not None and shares is not None:
            changes.append((self.shares, shares))
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

    def averaged(self, observed: Tensor, touched: Tensor, present: Tensor) -> Averages:
        """The averages after a step; the arguments are those of ``measured``."""
        (norms, counts, shares), whole = self.averages(), observed
        if not self._own_layers:
            touched = self._by_layer(touched.to(self.dtype)) > 0
            whole = balancing.layer_norms(observed, self._layer_of, len(self.layers.names))
        how: dict[str, Any] = {"norm_init": self.options.norm_init, "quadratic": self._quadratic}
        new, more = balancing.update_norms(norms, counts, whole, touched & present, self._beta3, **how)
        if shares is not None:
            newest = meetings.newest_share(new, whole, counts, more, (self._beta3, 1 + self._quadratic))
            shares = meetings.follow_shares(shares, observed, *map(self.by_parameter, (whole, newest)))
        return Averages(new, more, shares)

    def scales(self, averages: Averages) -> Tensor:
        """What multiplies each term's gradient: [L, I]."""
        anchor, told, most = self.options.anchor, self._told_apart(averages), self.options.max_scale
        if told.shares is not None and anchor not in (None, "unit"):
            ratios = self._ratios(told)
            return balancing.balance_scales((ratios > 0).to(ratios), ratios, self._importance, most)
        target = balancing.target_norms(told.counted, anchor, self.terms)
        return balancing.balance_scales(told.norms, target, self._importance, most)

    def balance_weights(self) -> Tensor:
        """``n_i / n_anchor``, or over the first term's without an anchor: [L, I]; nan where a term is not heard."""
        self.follow_groups()
        told = self._told_apart(self.averages())
        if told.shares is not None:
            return self._ratios(told).reciprocal().masked_fill(told.norms == 0, nan)
        return balancing.balance_weights(told.norms, balancing.reference_norms(told.counted, self._reference))

    def reaching(self, observed: Tensor, scales: Tensor) -> Tensor:
        """Where a term's own clock begins: its gradient is neither zero nor left out. [P, I], [L, I] -> [P, I]."""
        return (observed > 0) & self.by_parameter(scales > 0 if self._silent is None else (scales > 0) | self._silent)

    def settled(self, averages: Averages, anchor: int | None) -> Tensor:
        """Where a term's scale depends on no other but the ``anchor``, if there is one: [L, I] bool."""
        told = self._told_apart(averages)
        if anchor is None:
            return self._everywhere(~told.faint)
        at = slice(anchor, anchor + 1)
        known = self._everywhere(~told.faint[:, at] & (~told.faint | told.clear[:, at]))
        if told.shares is None:
            return (told.norms[:, at] > 0) & known
        return (self._met(told)[:, anchor] > 0) & known

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
            self._frozen = self.scales(self.averages())
        return self._frozen

    def freeze(self, scales: Tensor | None) -> None:
        """Keep the scales of a measured step; ``None``: those that the tables give."""
        self._frozen = scales

    def corrected_norms(self) -> Tensor:
        """The gradient norms n_i: [L, I]."""
        self.follow_groups()
        norms, counts, _ = self.averages()
        rule = self.options.norm_init
        return balancing.corrected_norms(norms, counts, self._beta3, rule, quadratic=self._quadratic)

    def average_scales(self) -> Tensor:
        """The mean scales so far, [L, I], float64 on the host: nan where never reached, zero where importance is."""
        found = (self.log_scales, self.log_scale_counts, self._layer_of, self.averages().counts)
        logs, counts, layer_of, reached = (tensor.to("cpu") for tensor in found)
        averages = balancing.average_scales(logs.double(), counts.double(), layer_of, len(self.layers.names))
        averages[:, [self.options.importance.get(term, 1) == 0 for term in self.terms]] = 0
        return torch.where(reached > 0, averages, nan)

    def averages(self) -> Averages:
        """As they are."""
        if self._own_layers:
            return Averages(self.norms, self.counts, self.shares)
        return Averages(self._by_layer(self.norms), self._by_layer(self.counts), self.shares)

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

    def _everywhere(self, flags: Tensor) -> Tensor:
        """Whether it holds for all parameters of a layer, [L, I]; flags of layers as they are."""
        return flags if self.shares is None else self._by_layer((~flags).to(self.dtype)) == 0

    def _told_apart(self, averages: Averages) -> Told:
        """What is noise, and what is not."""
        rule, (norms, counts, shares) = self.options.norm_init, averages
        found = seen = balancing.corrected_norms(norms, counts, self._beta3, rule, quadratic=self._quadratic)
        if rule == "one":
            seen = balancing.without_start(found, counts, self._beta3)
        if shares is not None:
            seen = meetings.parameter_norms(self.by_parameter(seen), shares)
        noise, faint, clear = balancing.loudness(seen, self._silent)
        heard = found if shares is None else shares
        heard = heard if self.options.anchor is None else heard.masked_fill(noise, 0)
        norms = heard
        if shares is not None:  # a parameter that a term does not reach cannot be noise of it
            norms, faint = torch.where(self._by_layer(heard) > 0, found, 0), faint & (seen > 0)
        counted = norms if self._left_out is None else norms.masked_fill(self._left_out, 0)
        return Told(norms, counted, None if shares is None else heard, faint, clear)

    def _met(self, told: Told) -> Tensor:
        """The norm of each term where it meets each other: [L, I, I]."""
        assert told.shares is not None
        return meetings.norms_where_met(told.norms, told.shares, self._layer_of)

    def _ratios(self, told: Told) -> Tensor:
        """``n_anchor / n_i``, where terms meet: [L, I]."""
        return meetings.ratios(self._met(told), self._reference, self._left_out)

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
