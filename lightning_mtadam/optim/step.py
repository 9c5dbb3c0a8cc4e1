"""One step of MTAdam: norms, balance, clocks, then the update of every block of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim import compiled, fused, kernels
from lightning_mtadam.optim.balance import Balance
from lightning_mtadam.optim.blocks import Work, Workshop
from lightning_mtadam.optim.finite import FiniteWatch
from lightning_mtadam.optim.kernels import Coefficients, Hyperparameters, Update
from lightning_mtadam.optim.layers import Layers
from lightning_mtadam.optim.layout import BLOCK, Span, TermMemory, place
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.pending import ClipAlgorithm, Gradients, PendingGradients
from lightning_mtadam.optim.schedule import SUM
from lightning_mtadam.optim.state import State


class _Job(NamedTuple):
    """What the update of a block works on, but for the coefficients: they are known when the balance is."""

    work: Work
    columns: Tensor
    hyper: Hyperparameters
    update: Update


class Stepper:
    """The stages of one step over the parameters that have a state: ``P`` of them, in ``L`` layers, with ``I`` terms.

    It is kept from step to step, as long as it fits: moments of parameters that are packed are then views into common
    tensors, and nothing has to be brought together.

    Args:
        options: the optimizer's options.
        groups: its parameter groups.
        state: its state by parameter.
        layers: the layers of all its parameters.
        parameter_names: the names of all its parameters, for messages.
        terms: the names of the terms.
    """

    def __init__(
        self,
        options: Options,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, State],
        layers: Layers,
        parameter_names: Sequence[str],
        terms: tuple[str, ...],
    ) -> None:
        self.options, self.terms = options, terms
        owners = [(parameter, group) for group in groups for parameter in group["params"]]
        self.all = [parameter for parameter, _ in owners]
        self.members = [index for index, parameter in enumerate(self.all) if state.get(parameter)]
        self.row = {member: row for row, member in enumerate(self.members)}
        self.states = [state[self.all[member]] for member in self.members]
        self.groups = [owners[member][1] for member in self.members]
        self.names = [parameter_names[member] for member in self.members]
        whole = [self.all[member] for member in self.members]
        self.balance = Balance(options, self.groups, self.states, whole, layers, self.members, terms)
        self.workshop = Workshop(self.all, self.row, self.states, self.groups, options.moments(len(terms)))
        self._amsgrad = any("max_exp_avg_sq" in one for one in self.states)
        self._scratch = torch.empty(0)

    def fits(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, State],
        layers: Layers,
        terms: tuple[str, ...],
    ) -> bool:
        """Whether it was made for these, and nothing was loaded or replaced since."""
        parameters = [parameter for group in groups for parameter in group["params"]]
        states = [state[parameter] for parameter in parameters if state.get(parameter)]
        return (
            self.balance.layers is layers
            and self.terms == terms
            and list(map(id, parameters)) == list(map(id, self.all))
            and self.balance.table.belongs_to(states)
        )

    def step(self, pending: PendingGradients, watch: FiniteWatch) -> Tensor:
        """Consume the pending gradients.

        Returns:
            The scales, [L, I].

        Raises:
            NonFiniteError: a gradient is inf or nan; nothing was changed.
        """
        memory = pending.active
        light = SUM in pending.gradients
        terms = (SUM,) if light else self.terms
        gradients = [self.of_members(pending.gradients.get(term)) for term in terms]
        touched = [any(gradient is not None for gradient in column) for column in zip(*gradients, strict=True)]
        known = [self.of_members(pending.norms[term]) if term in pending.norms else None for term in terms]
        observed = self.balance.observe(gradients, known)
        finite = watch.check(observed, self.names, terms)
        works = self.workshop.works(memory.spans, touched, self._limit(memory))
        jobs = self._jobs(memory, works, pending.clip, finite)
        if light:
            self.balance.tick(torch.zeros_like(observed, dtype=torch.bool), touched, finite)
            self.balance.record(self.balance.frozen_scales, finite)
            scales = torch.ones_like(observed[: len(self.balance.layers.names)])
        else:
            self.balance.average(observed, touched, [term in pending.gradients for term in terms], finite)
            self.balance.tick(observed > 0, touched, finite)
            scales = self.balance.scales()
            self.balance.record(scales, finite)
        if pending.clip is not None and pending.clip[0] == "norm":
            scales = scales * self._clip_factor(memory, works, scales, pending.clip[1])
        self._update(jobs, scales, finite)
        return self.balance.frozen_scales * scales if light else scales

    def _limit(self, memory: TermMemory) -> int:
        """The elements of a block."""
        if self.options.compile:
            return 1 << 62
        if all(fused.suits(self.options.denominator, rows.device, rows.dtype) for rows in memory.rows):
            return fused.BLOCK
        return max(1, BLOCK // memory.count)

    def _jobs(
        self, memory: TermMemory, works: Sequence[Work], clip: tuple[ClipAlgorithm, float] | None, finite: Tensor | None
    ) -> list[_Job]:
        """What is to be done. What cannot be compiled raises here, where nothing is changed yet."""
        clip_value = clip[1] if clip is not None and clip[0] == "value" else None
        numbers = {id(group): self.hyperparameters(group, clip_value, finite) for group in self.balance.distinct}
        jobs = list[_Job]()
        for work in works:
            columns, hyper = memory.columns(work.block), numbers[id(work.group)]
            packed = not isinstance(work.rows, int)
            update: Update = kernels.update
            if self.options.compile:
                update = compiled.updater(columns, work.moments, hyper, packed=packed)
            elif fused.applies(columns, work.moments, hyper, packed=packed):
                update = fused.update
            jobs.append(_Job(work, columns, hyper, update))
        return jobs

    def _update(self, jobs: Sequence[_Job], scales: Tensor, finite: Tensor | None) -> None:
        table = self.coefficients(scales, finite)
        local: dict[int, Coefficients] = {}  # of one parameter for all its blocks
        for work, columns, hyper, update in jobs:
            scratch = self.scratch_for(columns, len(columns) + 1)
            found = local.get(work.rows) if isinstance(work.rows, int) else None
            if found is None:
                found = work.local(table, columns.device, scratch.dtype)
            if isinstance(work.rows, int):
                local[work.rows] = found
            flat = work.elements()
            update(flat, columns, work.moments, found, hyper, scratch)
            work.put_back(flat)

    def _clip_factor(self, memory: TermMemory, works: Sequence[Work], scales: Tensor, limit: float) -> Tensor:
        rows = self.balance.by_parameter(scales)
        parts: dict[sharding.Sharding | None, list[Tensor]] = {cut: [] for cut in self.balance.shardings}
        for work in works:
            columns = memory.columns(work.block)
            local = work.spread(rows).to(columns.device)
            norm = kernels.balanced_norm(columns, local, self.scratch_for(columns, len(columns)))
            parts[work.cut].append(norm.to(scales))
        zero = torch.zeros_like(scales[0, 0])  # this process's part of a tensor may be empty
        norms = [torch.linalg.vector_norm(torch.stack([zero, *mine])) for mine in parts.values()]
        joined = [sharding.join_norms(norm, cut) for norm, cut in zip(norms, parts, strict=True)]
        factor: Tensor = limit / (torch.linalg.vector_norm(torch.stack(joined)) + 1e-6)
        return factor.clamp(max=1)  # as torch.nn.utils.clip_grad_norm_

    def coefficients(self, scales: Tensor, finite: Tensor | None) -> Coefficients:
        """The coefficients of all parameters: [P, I] or [P, 1] each."""
        balance = self.balance
        shared, own = balance.table.clocks[:, :1], balance.table.clocks[:, 1:]
        denominator = self.options.denominator
        squares = shared if denominator == "sum" else own
        weights = balance.weights(squares)
        first, second = self.options.moments(len(self.terms))
        factor = balance.correction(own if denominator == "own" else shared, 0) * (first / second)
        reaching: Tensor | None = None
        if "mean" in (denominator, self.options.update):
            reaching = (own > 0).sum(1, keepdim=True).clamp(min=1).to(scales)
        if reaching is not None and self.options.update == "mean":
            factor = factor * reaching
        if finite is not None:
            weights, factor = torch.where(finite, weights, 0), torch.where(finite, factor, torch.inf)
        return Coefficients(
            scales=balance.by_parameter(scales),
            weights=weights,
            factor=factor,
            reaching=reaching if denominator == "mean" else None,
            correction=balance.correction(squares, 1) if self._amsgrad else None,
        )

    def hyperparameters(
        self, group: Mapping[str, Any], clip_value: float | None, finite: Tensor | None
    ) -> Hyperparameters:
        """The numbers of a group."""
        lr = float(group["lr"])
        return Hyperparameters(
            lr=-lr if group["maximize"] else lr,
            beta1=group["betas"][0],
            eps=group["eps"],
            decay=1 - lr * group["weight_decay"],
            denominator=self.options.denominator,
            clip_value=clip_value,
            finite=finite,
        )

    def scratch_for(self, columns: Tensor, rows: int) -> Tensor:
        """Memory for balanced gradients; fresh memory for every block would cost more than what is done with it."""
        dtype = torch.promote_types(columns.dtype, torch.float32)
        if self.options.compile and columns.shape[-1] > 1:  # fewer elements are not compiled
            return columns.new_empty(0, dtype=dtype)
        width, kept = columns.shape[-1], self._scratch
        if (kept.dtype, kept.device) != (dtype, columns.device) or kept.numel() < rows * width:
            kept = self._scratch = torch.empty(rows * width, dtype=dtype, device=columns.device)
        return kept[: rows * width].view(rows, width)

    @cached_property
    def spans(self) -> list[Span]:
        """Every parameter that has a state, by itself."""
        parameters = [sharding.local(parameter) for parameter in self.all]
        return place(parameters, [index in self.row for index in range(len(parameters))], [None] * len(parameters))

    def of_members(self, gradients: Gradients | None) -> list[Tensor | None]:
        """Those of the parameters that have a state."""
        return [None] * len(self.members) if gradients is None else [gradients[member] for member in self.members]
