"""One step of MTAdam: norms, balance, clocks, then the update of every block of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim import compiled, kernels
from lightning_mtadam.optim.balance import Balance
from lightning_mtadam.optim.finite import FiniteWatch
from lightning_mtadam.optim.kernels import Coefficients, Hyperparameters, Moments, Update
from lightning_mtadam.optim.layers import Layers
from lightning_mtadam.optim.layout import BLOCK, Block, Span, TermMemory
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.pending import ClipAlgorithm, Gradients, PendingGradients
from lightning_mtadam.optim.schedule import SUM
from lightning_mtadam.optim.state import State, join_moments


class _Job(NamedTuple):
    """What the update of a block works on, but for the coefficients: they are known when the balance is."""

    block: Block
    columns: Tensor
    moments: Moments
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
        self._moments: dict[Span, tuple[Moments, list[dict[str, Tensor]]]] = {}
        self._owners: dict[Span, Tensor] = {}
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
        memory = pending.memory
        assert memory is not None
        light = SUM in pending.gradients
        terms = (SUM,) if light else self.terms
        gradients = [self.of_members(pending.gradients.get(term)) for term in terms]
        touched = [any(gradient is not None for gradient in column) for column in zip(*gradients, strict=True)]
        known = [self.of_members(pending.norms[term]) if term in pending.norms else None for term in terms]
        observed = self.balance.observe(gradients, known)
        finite = watch.check(observed, self.names, terms)
        blocks = list(self._blocks(memory, touched))
        jobs = self._jobs(memory, blocks, pending.clip, finite)
        if light:
            self.balance.tick(torch.zeros_like(observed, dtype=torch.bool), touched, finite)
            scales = torch.ones_like(observed[: len(self.balance.layers.names)])
        else:
            self.balance.average(observed, touched, [term in pending.gradients for term in terms], finite)
            self.balance.tick(observed > 0, touched, finite)
            scales = self.balance.scales()
        if pending.clip is not None and pending.clip[0] == "norm":
            scales = scales * self._clip_factor(memory, blocks, scales, pending.clip[1])
        self._update(jobs, scales, finite)
        return self.balance.scales() if light else scales

    def _jobs(
        self,
        memory: TermMemory,
        blocks: Sequence[Block],
        clip: tuple[ClipAlgorithm, float] | None,
        finite: Tensor | None,
    ) -> list[_Job]:
        """What is to be done. What cannot be compiled raises here, where nothing is changed yet."""
        clip_value = clip[1] if clip is not None and clip[0] == "value" else None
        numbers = {id(group): self.hyperparameters(group, clip_value, finite) for group in self.groups}
        jobs = list[_Job]()
        for block in blocks:
            columns, moments = memory.columns(block), self.moments_of(block)
            hyper = numbers[id(self.groups[self.row[block.members[0]]])]
            update: Update = kernels.update
            if self.options.compile:
                update = compiled.updater(columns, moments, hyper, packed=len(block.span.members) > 1)
            jobs.append(_Job(block, columns, moments, hyper, update))
        return jobs

    def _update(self, jobs: Sequence[_Job], scales: Tensor, finite: Tensor | None) -> None:
        table = self.coefficients(scales, finite)
        for block, columns, moments, hyper, update in jobs:
            flat = self.elements(block)
            update(flat, columns, moments, self.local(block, table, columns), hyper, self.scratch_like(columns))
            self.put_back(block, flat)

    def _blocks(self, memory: TermMemory, touched: Sequence[bool]) -> list[Block]:
        wanted = [False] * len(self.all)
        for member, flag in zip(self.members, touched, strict=True):
            wanted[member] = flag
        limit = max(1, BLOCK // memory.count) if not self.options.compile else 1 << 62
        return [block for span in memory.spans for block in span.runs(wanted, limit)]

    def _clip_factor(self, memory: TermMemory, blocks: Sequence[Block], scales: Tensor, limit: float) -> Tensor:
        rows = self.balance.by_parameter(scales)
        parts: dict[sharding.Sharding | None, list[Tensor]] = {cut: [] for cut in self.balance.shardings}
        for block in blocks:
            columns = memory.columns(block)
            local = self._spread(block, rows).to(columns.device)
            norm = kernels.balanced_norm(columns, local, self.scratch_like(columns))
            parts[self.balance.shardings[self.row[block.members[0]]]].append(norm.to(scales))
        zero = torch.zeros_like(scales[0, 0])  # this process's part of a tensor may be empty
        norms = [torch.linalg.vector_norm(torch.stack([zero, *mine])) for mine in parts.values()]
        joined = [sharding.join_norms(norm, cut) for norm, cut in zip(norms, parts, strict=True)]
        factor: Tensor = limit / (torch.linalg.vector_norm(torch.stack(joined)) + 1e-6)
        return factor.clamp(max=1)  # as torch.nn.utils.clip_grad_norm_

    def coefficients(self, scales: Tensor, finite: Tensor | None) -> Coefficients:
        """The coefficients of all parameters: [P, I] or [P, 1] each."""
        balance = self.balance
        shared, own = balance.table.clocks[:, :1], balance.table.clocks[:, 1:]
        own_moments = self.options.denominator == "own"
        squares = shared if self.options.denominator == "sum" else own
        correction = balance.correction(squares, 1)
        weights = balance.weights(squares)
        reaching = (own > 0).sum(1, keepdim=True).clamp(min=1).to(scales)
        factor = balance.correction(own if own_moments else shared, 0)
        if self.options.update == "mean":
            factor = factor * reaching
        if finite is not None:
            weights, factor = torch.where(finite, weights, 0), torch.where(finite, factor, torch.inf)
        return Coefficients(
            scales=balance.by_parameter(scales),
            weights=weights,
            factor=factor,
            reaching=reaching if self.options.denominator == "mean" else None,
            correction=correction,
        )

    def local(self, block: Block, table: Coefficients, like: Tensor) -> Coefficients:
        """The coefficients of a block, on its device and in the dtype of its arithmetic."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        amsgrad = "max_exp_avg_sq" in self.states[self.row[block.members[0]]]

        def local(rows: Tensor) -> Tensor:
            return self._spread(block, rows).to(like.device, dtype)

        return Coefficients(
            local(table.scales),
            local(table.weights),
            local(table.factor),
            None if table.reaching is None else local(table.reaching),
            local(table.correction) if amsgrad and table.correction is not None else None,
        )

    def _spread(self, block: Block, rows: Tensor) -> Tensor:
        """Give each element the row of its parameter, [P, k] -> [k, elements]; one parameter's for all, [k, 1]."""
        if len(block.span.members) == 1:
            return rows[self.row[block.members[0]]][:, None]
        return rows.T.index_select(1, self._owner(block.span)[block.begin : block.end])

    def _owner(self, span: Span) -> Tensor:
        if span not in self._owners:
            sizes = [end - begin for begin, end in pairwise(span.bounds)]
            rows = torch.tensor([self.row[member] for member in span.members], device="cpu")
            self._owners[span] = rows.repeat_interleave(torch.tensor(sizes, device="cpu")).to(self.balance.device)
        return self._owners[span]

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

    def elements(self, block: Block) -> Tensor:
        """The elements of a block, flat; a view if they are one parameter's and contiguous."""
        members = [sharding.local(self.all[member]).detach() for member in block.members]
        if len(members) > 1:
            return torch.cat([member.reshape(-1) for member in members])
        return members[0].reshape(-1)[block.begin - block.span.bounds[block.first] :][: block.end - block.begin]

    def put_back(self, block: Block, flat: Tensor) -> None:
        """Write to the parameters what was not a view of them."""
        members = [sharding.local(self.all[member]).detach() for member in block.members]
        if len(members) > 1:
            pieces = torch.split(flat, block.sizes)
            torch._foreach_copy_(members, [piece.view_as(one) for piece, one in zip(pieces, members, strict=True)])
        elif not members[0].is_contiguous():
            start = block.begin - block.span.bounds[block.first]
            whole = members[0].reshape(-1)
            whole[start : start + len(flat)] = flat
            members[0].copy_(whole.view_as(members[0]))

    def moments_of(self, block: Block) -> Moments:
        """Views into the moments of the block's span, which are brought together if they are not."""
        span = block.span
        states = [self.states[self.row[member]] for member in span.members]
        moments, seen = self._moments.get(span, (None, []))
        if moments is None or any(
            state[key] is not one[key] for state, one in zip(states, seen, strict=True) for key in one
        ):
            moments, seen = self._join_moments(span, states)
            self._moments[span] = moments, seen
        cut = slice(block.begin, block.end)
        largest = moments.max_exp_avg_sq
        return replace(
            moments,
            exp_avg=moments.exp_avg[:, cut],
            exp_avg_sq=moments.exp_avg_sq[:, cut],
            max_exp_avg_sq=None if largest is None else largest[:, cut],
        )

    def _join_moments(self, span: Span, states: Sequence[State]) -> tuple[Moments, list[dict[str, Tensor]]]:
        sizes = [end - begin for begin, end in pairwise(span.bounds)]
        leading = dict(zip(("exp_avg", "exp_avg_sq"), self.options.moments(len(self.terms)), strict=True))
        if "max_exp_avg_sq" in states[0]:
            leading["max_exp_avg_sq"] = leading["exp_avg_sq"]
        joined = {key: join_moments(states, key, count, sizes) for key, count in leading.items()}
        moments = Moments(joined["exp_avg"], joined["exp_avg_sq"], joined.get("max_exp_avg_sq"))
        return moments, [{key: state[key] for key in leading} for state in states]

    def scratch_like(self, columns: Tensor) -> Tensor:
        """Memory for balanced gradients; fresh memory for every block would cost more than what is done with it."""
        dtype = torch.promote_types(columns.dtype, torch.float32)
        if self.options.compile:
            return columns.new_empty(0, dtype=dtype)
        if (self._scratch.dtype, self._scratch.device) != (
            dtype,
            columns.device,
        ) or self._scratch.numel() < columns.numel():
            self._scratch = torch.empty(columns.numel(), dtype=dtype, device=columns.device)
        return self._scratch[: columns.numel()].view(columns.shape)

    def of_members(self, gradients: Gradients | None) -> list[Tensor | None]:
        """Those of the parameters that have a state."""
        return [None if gradients is None else gradients[member] for member in self.members]
