"""One step of MTAdam: norms, balance, clocks, then the update of every block of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim import compiled, fused, kernels
from lightning_mtadam.optim.balance import Balance
from lightning_mtadam.optim.blocks import Work, Works, Workshop
from lightning_mtadam.optim.compiled_plan import CompiledPlan
from lightning_mtadam.optim.finite import FiniteWatch
from lightning_mtadam.optim.kernels import Coefficients, Hyperparameters, Update
from lightning_mtadam.optim.layers import Layers
from lightning_mtadam.optim.layout import BLOCK, Span, TermMemory, place
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.pending import Gradients, PendingGradients
from lightning_mtadam.optim.plan import Plan
from lightning_mtadam.optim.schedule import SUM
from lightning_mtadam.optim.state import State


class _Job(NamedTuple):
    """What updates a block, and what of it stays where it is from step to step."""

    work: Work
    columns: Tensor
    update: Update


_Key: TypeAlias = tuple[TermMemory, Works, list[tuple[float, bool, bool]], int]


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
        plan = Plan(options, self.balance, amsgrad=any("max_exp_avg_sq" in one for one in self.states))
        self.plan = CompiledPlan(plan) if options.compile else plan
        self._frozen: Tensor | None = None
        self._prepared: tuple[_Key, list[_Job]] | None = None
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
        clip_value = pending.clip[1] if pending.clip is not None and pending.clip[0] == "value" else None
        numbers = self.hyperparameters(clip_value, finite)
        jobs = self._jobs(memory, works, numbers)
        reached, decays = self.balance.flags(touched), self.balance.decays()
        if light:
            scales, table = self.plan.light(observed, reached, self.frozen_scales, decays, finite)
        else:
            present = self.balance.constant([term in pending.gradients for term in terms], torch.bool)
            scales, table = self.plan.measured(observed, reached, present, decays, finite)
            self._frozen = None  # read from the tables, as after a checkpoint: compiled, the last digit may differ
        if pending.clip is not None and pending.clip[0] == "norm":
            factor = self._clip_factor(jobs, works.spread(table.scales), scales, pending.clip[1])
            scales, table = scales * factor, replace(table, scales=table.scales * factor)
        self._update(jobs, works.local(table), numbers)
        return self.frozen_scales * scales if light else scales

    @property
    def frozen_scales(self) -> Tensor:
        """The scales of the last measured step, [L, I]; worked out once between two of them."""
        if self._frozen is None:
            self._frozen = self.balance.scales(self.balance.decays())
        return self._frozen

    def _limit(self, memory: TermMemory) -> int:
        """The elements of a block."""
        if self.options.compile:
            return 1 << 62
        if all(fused.suits(self.options.denominator, rows.device, rows.dtype) for rows in memory.rows):
            return fused.BLOCK
        return max(1, BLOCK // memory.count)

    def _jobs(self, memory: TermMemory, works: Works, numbers: Mapping[int, Hyperparameters]) -> list[_Job]:
        """What is to be done; it stays the same as long as nothing but numbers change.

        What cannot be compiled raises here, where nothing is changed yet.
        """
        kinds = [(hyper.eps, hyper.clip_value is None, hyper.finite is None) for hyper in numbers.values()]
        key = (memory, works, kinds, torch.get_num_threads())
        if self._prepared is None or self._prepared[0] != key:
            columns = [memory.columns(work.block) for work in works]
            made = [
                _Job(work, found, self._update_of(work, found, numbers[id(work.group)]))
                for work, found in zip(works, columns, strict=True)
            ]
            self._prepared = key, made
        return self._prepared[1]

    def _update_of(self, work: Work, columns: Tensor, hyper: Hyperparameters) -> Update:
        packed = not isinstance(work.rows, int)
        if self._is_compiled(columns):
            return compiled.updater(columns, work.moments, hyper, packed=packed)
        return fused.update if fused.applies(columns, work.moments, hyper, packed=packed) else kernels.update

    def _is_compiled(self, columns: Tensor) -> bool:
        return self.options.compile and columns.shape[1] > 1  # a kernel whose size is free takes two and more

    def _update(
        self, jobs: Sequence[_Job], local: Iterable[Coefficients], numbers: Mapping[int, Hyperparameters]
    ) -> None:
        # Between updates, which flush the cache, it would take longer; but each scattered piece copies its whole.
        early = [None if job.work.scattered else job.work.elements() for job in jobs]
        for (work, columns, update), held, found in zip(jobs, early, local, strict=True):
            unused = self._is_compiled(columns)
            scratch = self._scratch if unused else self.scratch_for(columns, len(columns) + 1)
            flat = work.elements() if held is None else held
            update(flat, columns, work.moments, found, numbers[id(work.group)], scratch)
            if held is None:
                work.put_back(flat)
        for job, held in zip(jobs, early, strict=True):
            if held is not None:
                job.work.put_back(held)

    def _clip_factor(self, jobs: Sequence[_Job], local: Iterable[Tensor], scales: Tensor, limit: float) -> Tensor:
        parts: dict[sharding.Sharding | None, list[Tensor]] = {cut: [] for cut in self.balance.shardings}
        for (work, columns, _), rows in zip(jobs, local, strict=True):
            norm = kernels.balanced_norm(columns, rows, self.scratch_for(columns, len(columns)))
            parts[work.cut].append(norm.to(scales))
        zero = torch.zeros_like(scales[0, 0])  # this process's part of a tensor may be empty
        norms = [torch.linalg.vector_norm(torch.stack([zero, *mine])) for mine in parts.values()]
        joined = [sharding.join_norms(norm, cut) for norm, cut in zip(norms, parts, strict=True)]
        factor: Tensor = limit / (torch.linalg.vector_norm(torch.stack(joined)) + 1e-6)
        return factor.clamp(max=1)  # as torch.nn.utils.clip_grad_norm_

    def hyperparameters(self, clip_value: float | None, finite: Tensor | None) -> dict[int, Hyperparameters]:
        """The numbers of each group, by its identity."""
        return {id(group): self._numbers(group, clip_value, finite) for group in self.balance.distinct}

    def _numbers(self, group: Mapping[str, Any], clip_value: float | None, finite: Tensor | None) -> Hyperparameters:
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
        if self._is_compiled(columns):
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
