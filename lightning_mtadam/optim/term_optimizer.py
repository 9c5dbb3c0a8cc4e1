"""An optimizer that is given the gradient of every term: how they are collected, and what is kept for the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_mtadam.collect import Batch, as_losses, collect
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.collect.norms import FiniteWatch, are_on_host
from lightning_mtadam.collect.pending import ClipAlgorithm, PendingGradients
from lightning_mtadam.distributed import sharding
from lightning_mtadam.distributed.agreement import Numbers, Parameters
from lightning_mtadam.distributed.joint_terms import Ranks
from lightning_mtadam.distributed.probing import is_probed
from lightning_mtadam.distributed.processes import processes_of
from lightning_mtadam.distributed.uninterrupted import uninterrupted
from lightning_mtadam.lightning_internals import as_fabric_backward
from lightning_mtadam.optim.layers import LayerNames
from lightning_mtadam.optim.low_memory import LowMemory
from lightning_mtadam.optim.options import LayerRule, Options
from lightning_mtadam.optim.schedule import SUM, is_measured, weighted_sum
from lightning_mtadam.optim.state import MOMENT_KEYS, allocate
from lightning_mtadam.optim.tables import Tables
from lightning_mtadam.optim.update import Updater
from lightning_mtadam.terms import Losses, NonFiniteError, check_losses, check_terms, refuse_reentrant_checkpoints, warn


class TermOptimizer(Optimizer):
    """Collects the gradients of named losses; a subclass consumes them. ``terms``: their names, if known ahead."""

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], options: Options, terms: Iterable[str] | None
    ) -> None:
        # Lightning wraps optimizers in an object that has this class but not these attributes: methods may change
        # what they hold, but never assign them anew.
        self._options = options
        self._given_terms = terms = () if terms is None else check_terms(terms)
        if terms:
            options.check_terms(terms)
        self._layer_names = LayerNames(options.layers)
        self._reset_transient()
        super().__init__(params, {**defaults, "terms": terms, **options.state_meaning})

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the loss terms, in order; empty until they are known."""
        return tuple(self.param_groups[0]["terms"])

    @uninterrupted()
    def backward(
        self,
        losses: Losses,
        *,
        model: nn.Module | None = None,
        grad_output: Tensor | None = None,
        loss_scale: Tensor | None = None,
    ) -> None:
        """Differentiate each loss by itself and hold its gradients for :meth:`step`; in place of ``sum.backward()``.

        ``p.grad`` gets the sum over the terms. Gradients add up until :meth:`step` or :meth:`zero_grad` drops them.

        Args:
            losses: named scalar losses. Terms may be absent, or zero without a graph; an unknown name is an error.
            model: the network as it is called; needed only where several processes train together. If it is wrapped by
                ``DistributedDataParallel``, gradients are averaged over its processes, which agree on the terms in each
                call; not within its ``no_sync()``. Parameters sharded by ``fully_shard`` are always averaged.
            grad_output: scalar by which every loss is multiplied, e.g. one over the number of accumulated batches.
            loss_scale: what a gradient scaler multiplied into ``grad_output``: the gradients are divided by it.

        Raises:
            ValueError: no losses, a loss that is no scalar, has no graph or reaches no parameter, an unknown name; a
                step of LBFGS is running; the processes have different terms, or train different parameters.
            TypeError: a loss that is no real floating-point tensor.
            NonFiniteError: a loss that is inf or nan, unless there is a ``loss_scale``.
            RuntimeError: another process has failed.
        """
        parameters, pending = self._parameters(), self._pending
        pending.start_anew_if_reset(parameters)
        if loss_scale is not None:
            self._refuse_with_low_memory("a gradient scaler")
        if pending.absorbed is not None:
            self._refuse_with_low_memory("accumulation over several backward passes")
        losses = as_losses(losses, self, by=type(self).__name__)
        batch = Batch(losses, parameters, model, grad_output, loss_scale, processes_of(model, parameters))
        taken = collect(batch, partial(self._check, batch), self._take, self.terms, pending.terms, self._ranks)
        pending.terms = taken.collected
        if not self.terms:
            self._set_terms(taken.terms)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the collected gradients, and reset ``p.grad``; ``model.zero_grad()`` does so too, unless to zeros."""
        probed, self._pending.probed = self._pending.probed, False
        self._pending.clear()
        super().zero_grad(set_to_none)
        if probed:
            raise RuntimeError(
                "torch.distributed.checkpoint needs the optimizer's state, which there is not before the terms are"
                " known. Name them ahead: MTAdam(..., terms=(...)). Nothing was changed."
            )

    def skip_step(self) -> None:
        """Let the next :meth:`step` do nothing, as after a forward pass alone."""
        self._pending.clear()
        self._pending.skip = True

    def clip_gradients(self, limit: float, algorithm: ClipAlgorithm = "norm") -> None:
        """Clip the balanced gradient, the sum over the terms, in the next :meth:`step`; not ``p.grad``.

        ``limit`` is the largest L2 norm over all parameters ("norm"), or magnitude of an entry ("value"). All terms
        take the same factor, so that clipping does not disturb the balance.
        """
        if algorithm not in ("norm", "value"):
            raise ValueError(f"algorithm must be 'norm' or 'value', but got {algorithm!r}.")
        if not limit > 0:
            raise ValueError(f"limit must be above 0, but got {limit!r}.")
        self._refuse_with_low_memory("clipping")
        self._pending.clip = (algorithm, float(limit))

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Name the parameters that have no name yet, as ``model.named_parameters()`` does."""
        if None in self._layer_names.names:
            self._layer_names.name(named_parameters, self._parameters())

    def __getstate__(self) -> dict[str, Any]:
        mine = {key: self.__dict__[key] for key in ("_options", "_given_terms", "_layer_names")}
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # checkpoints from before they were counted
            group.setdefault("steps", 0)
            group.setdefault("measured", ())
        self._reset_transient()

    def _reset_transient(self) -> None:
        self._pending = PendingGradients()
        self._last_scales: dict[str, Tensor] = {}
        self._watch = FiniteWatch()
        self._kept: list[Any] = []  # the key of the updater, the updater, and the moments that the key names
        self._counted: dict[str, Any] = {}  # what was counted before the last step
        self._ranks = Ranks(late=True)

    def _told_options(self) -> Numbers:
        """What must be the same on all ranks, as they tell each other."""
        options = {**vars(self._options), "layers": _name_of(self._options.layers), "terms": self._given_terms}
        told = [(name, repr(value)) for name, value in options.items()]
        for index, group in enumerate(self.param_groups):
            where = f" of group {index}" if len(self.param_groups) > 1 else ""
            names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
            told += [(f"{name}{where}", repr(group[name])) for name in names]
        return tuple(told)

    def _take(self, batch: Batch) -> None:
        pending, rows = self._pending, batch.terms
        factors = self._factors(batch)
        if factors is not None:
            batch, rows = replace(batch, losses=weighted_sum(batch.losses, factors)), (SUM,)
        with as_fabric_backward():
            if self._options.low_memory:
                self._absorb(batch)
                return
            pending.use(self._memory(len(batch.terms), batch).use(len(rows)), rows)
            pending.add(batch, rows)
        pending.light = factors is not None
        pending.show_sum(batch.parameters, batch.loss_scale)

    def _absorb(self, batch: Batch) -> None:
        known = self.terms
        self._set_terms(batch.terms)
        self._allocate()
        try:
            absorbed = LowMemory(self._updater(), self._watch)
            if batch.averaging is not None:
                self._pending.memory = self._memory(1, batch)
            absorbed.absorb_all(batch, self._pending.memory)
        except BaseException:
            if not known:  # nor are the terms now
                self.state.clear()
                self._set_terms(())
            raise
        self._pending.absorbed = absorbed

    def _factors(self, batch: Batch) -> Mapping[str, Tensor] | None:
        """By what to multiply the losses, if their sum alone is to be differentiated; ``None``: each by itself."""
        every, group, pending = self._options.balance_every, self.param_groups[0], self._pending
        if every == 1:
            return None
        self._recall()  # whether the step before counts must be known now
        light = pending.light
        if not pending.gradients:
            agreed = batch.processes.group is None or batch.processes.averages  # on the terms of all processes
            new = agreed and not set(batch.collected) <= set(group["measured"])
            light = not is_measured(group["steps"], every) and not new
        return dict(zip(self.terms, self._updater().tables.frozen_scales[0].unbind(), strict=True)) if light else None

    def _recall(self) -> None:
        """Tell of the step before if it was not finite, and that was not known then; and do not count it."""
        if self._watch.sent is None:
            return
        with self._skipping_nonfinite():
            try:
                self._watch.recall()
            except NonFiniteError:
                for group in self.param_groups:
                    group.update(self._counted)
                raise

    @contextmanager
    def _skipping_nonfinite(self) -> Iterator[None]:
        """Warn of gradients that are inf or nan in place of raising, if the user wants it so."""
        try:
            yield
        except NonFiniteError as error:
            if self._options.on_nonfinite == "raise":
                raise
            if not self._pending.warned:
                self._pending.warned = True
                warn(f"A step was skipped; others will be without a word. {error}")

    def _count(self) -> None:
        self._counted.update({key: self.param_groups[0][key] for key in ("steps", "measured")})
        measured = () if self._pending.light else self._pending.gradients
        for group in self.param_groups:
            group.update(steps=group["steps"] + 1, measured=tuple(dict.fromkeys((*group["measured"], *measured))))

    def _updater(self) -> Updater:
        """The one of the last step, unless parameters, terms, layers or states have been added, loaded or replaced."""
        if not self._kept or self._kept[0] != self._key():
            layers = self._layer_names.layers(self.param_groups)
            with torch.inference_mode(False):  # what an evaluation makes must be changed by the next step
                names, terms = self._layer_names.labels, self.terms
                updater = Updater(Tables(self._options, self.param_groups, self.state, layers, names, terms))
            self._kept[:] = [self._key(), updater, self._moments()]  # the tables hold what else the key names
        return self._kept[1]  # type: ignore[no-any-return]

    def _key(self) -> tuple[object, ...]:
        parameters = self._parameters()
        clocks = [self.state[parameter].get("step") if parameter in self.state else None for parameter in parameters]
        kept = [list(map(id, found)) for found in (parameters, clocks, self._moments())]
        return self._layer_names.found, self.terms, kept

    def _moments(self) -> list[Tensor | None]:
        """All moments in the state: one that was replaced counts."""
        return [state.get(key) for state in self.state.values() for key in MOMENT_KEYS]

    def _set_terms(self, terms: tuple[str, ...]) -> None:
        self.defaults["terms"] = terms
        for group in self.param_groups:
            group["terms"] = terms
        if self._given_terms:
            self._allocate()

    def _allocate(self) -> None:
        """Make the state of the parameters that are trained, or may have gradients pending."""
        memory = self._pending.memory if self._pending.gradients else None
        held = [] if memory is None else memory.trained
        new = [index for index, parameter in enumerate(self._parameters()) if not self.state.get(parameter)]
        if new:
            allocate(self.state, self.param_groups, held, self._options, len(self.terms))

    def _refuse_with_low_memory(self, what: str) -> None:
        """Raise if gradients are consumed as soon as they are there, so that there can be no ``what``."""
        if self._options.low_memory:
            raise ValueError(
                f"low_memory=True consumes each term's gradient as soon as it is there, but {what} needs those of all"
                " terms at once. Leave out low_memory=True, or do without."
            )

    def _memory(self, rows: int, batch: Batch) -> GradientMemory:
        """The memory that is there, if it fits."""
        parameters, sharded = batch.parameters, batch.processes.sharded
        parts = [sharding.local(parameter) for parameter in parameters] if sharded else parameters
        keys = [None if sharded else id(group) for group in self.param_groups for _ in group["params"]]
        trained = [parameter.requires_grad for parameter in parameters]
        return GradientMemory.fitting(self._pending.memory, parts, trained, keys, rows)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _check(self, batch: Batch) -> Parameters:
        finite = batch.loss_scale is None and self._options.on_nonfinite == "raise" and are_on_host(batch.parameters)
        check_losses(batch.losses, self.terms or None, finite=finite, graph=not batch.replicated)
        if not self._last_scales:  # what holds for the first step holds for all; and the last walks the whole graph
            self._options.check_terms(self.terms or tuple(batch.losses))
            refuse_reentrant_checkpoints(batch.losses)
        if self._layer_names.found is None:
            self._layer_names.layers(self.param_groups)
        if batch.processes.group is None:
            return ()
        if self._ranks.parameters is None:
            self._ranks.options = self._told_options()
        named = zip(self._layer_names.labels, batch.parameters, strict=True)
        return tuple((name, tuple(parameter.shape)) for name, parameter in named if parameter.requires_grad)

    def _check_nothing_to_do(self, *, skipped: bool) -> None:
        """Raise, unless a closure has said by returning ``None`` that there is nothing to do, or ``skip_step`` has."""
        if self._pending.skip:
            return
        if is_probed(self):
            self._pending.probed = True
            return
        if not skipped or any(p.grad is not None and bool(p.grad.any()) for p in self._parameters()):
            raise RuntimeError(
                "step() has nothing to consume: it takes the gradients of the terms, not p.grad. Before every step()"
                " call optimizer.backward({'name': loss, ...}) in place of loss.backward(), or in a LightningModule"
                " under manual optimization self.backward_terms({'name': loss, ...}, optimizer)."
            )


def _name_of(rule: LayerRule) -> str:
    """A rule by its name: what else stands for a function differs between processes."""
    return rule if isinstance(rule, str) else getattr(rule, "__qualname__", type(rule).__qualname__)
