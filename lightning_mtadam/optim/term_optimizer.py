"""An optimizer that is given the gradient of every term: how they are collected, and what is kept for the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lightning_mtadam.collect import Batch, as_losses, collect
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.distributed.agreement import Parameters
from lightning_mtadam.distributed.joint_terms import Ranks, told_options
from lightning_mtadam.distributed.probing import is_probed, refuse_probing
from lightning_mtadam.distributed.processes import processes_of
from lightning_mtadam.distributed.uninterrupted import uninterrupted
from lightning_mtadam.edits.shown import ClipAlgorithm, Shown, ShownGradients, Spent, run_hooks
from lightning_mtadam.finite import FiniteWatch
from lightning_mtadam.graphs import look_at, tell_of_added_gradients
from lightning_mtadam.groups import GroupsOptimizer, begin_anew, drop_misfits, identity_of, materialized
from lightning_mtadam.layers import LayerNames
from lightning_mtadam.lightning_internals import as_fabric_backward
from lightning_mtadam.optim.light import SUM, weighted_sum
from lightning_mtadam.optim.low_memory import LowMemory
from lightning_mtadam.optim.options import Options, check_group
from lightning_mtadam.optim.state import MOMENT_KEYS, allocate
from lightning_mtadam.optim.tables import Tables
from lightning_mtadam.optim.update import Updater
from lightning_mtadam.schedule import await_terms, due_terms, hangs_on
from lightning_mtadam.terms import Losses, NonFiniteError, are_on_host, check_losses, check_terms
from lightning_mtadam.wrappers import nothing_to_consume


class TermOptimizer(GroupsOptimizer):
    """Collects the gradients of named losses; a subclass consumes them. ``terms``: their names, if known ahead."""

    _layer_names: LayerNames

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
        self._layer_names.strict = True  # the names of the first groups are checked with the first losses

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the loss terms, in order; empty until they are known."""
        return tuple(self.defaults["terms"])

    @uninterrupted()
    def backward(
        self,
        losses: Losses,
        *,
        model: nn.Module | None = None,
        grad_output: Tensor | None = None,
        loss_scale: Tensor | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Differentiate each loss by itself and hold its gradients for :meth:`step`; in place of ``sum.backward()``.

        ``p.grad`` is then the balanced gradient, from which :meth:`step` takes the first moment: what is done to it
        counts. Gradients add up until :meth:`step` or :meth:`zero_grad` drops them; leaves that are not the optimizer's
        get none. ``p.register_hook`` sees each term, ``p.register_post_accumulate_grad_hook`` ``p.grad``.

        Args:
            losses: named scalar losses. Terms may be absent, or zero without a graph; an unknown name is an error.
            model: the network as it is called; needed only where several processes train together. They agree on the
                terms in each call, and average gradients: wrapped by ``DistributedDataParallel`` not in ``no_sync()``.
            grad_output: scalar by which every loss is multiplied, e.g. one over the number of accumulated batches.
            loss_scale: scalar, what a scaler multiplied into ``grad_output``: the gradients are divided by it.
            retain_graph: whether to keep the graph for another backward pass, e.g. for another optimizer.

        Raises:
            ValueError: no losses, a loss that is no scalar, has no graph or reaches no parameter, an unknown name; a
                step of LBFGS is running; the processes have different terms, or train different parameters.
            TypeError: a loss that is no real floating-point tensor.
            NonFiniteError: a loss that is inf or nan, unless there is a ``loss_scale``.
            RuntimeError: another process has failed.
        """
        parameters, pending = materialized(self._parameters()), self._pending
        others = (pending.spent if pending.shown is None else pending.shown).others(parameters)
        if pending.shown is not None:
            self._meet_edits(parameters, goes_on=True)
        if loss_scale is not None:
            self._options.refuse_with_low_memory("a gradient scaler")
        if pending.absorbed is not None:
            self._options.refuse_with_low_memory("accumulation over several backward passes")
        losses, given = as_losses(losses, self, by=type(self).__name__), (grad_output, loss_scale)
        batch = Batch(losses, parameters, model, *given, processes_of(model, parameters), retain_graph=retain_graph)
        take = partial(self._take, others=others)
        taken = collect(batch, partial(self._check, batch), take, self.terms, pending.terms, self._ranks)
        pending.terms = taken.collected
        run_hooks(parameters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the collected gradients, and reset ``p.grad``; ``model.zero_grad()`` does so too, unless to zeros."""
        probed, self._pending.probed = self._pending.probed, False
        self._pending.clear()
        super().zero_grad(set_to_none)
        self._pending.spent = self._pending.spent if set_to_none else Spent(self._parameters())
        if probed:
            refuse_probing()

    def skip_step(self) -> None:
        """Let the next :meth:`step` do nothing, as after a forward pass alone."""
        self._pending.clear()
        self._pending.skip, self._pending.spent = True, Spent(self._parameters())

    def clip_gradients(self, limit: float, algorithm: ClipAlgorithm = "norm") -> None:
        """Clip the balanced gradient, the sum over the terms, that :meth:`backward` has left in ``p.grad``.

        ``limit`` is the largest L2 norm over all parameters (``algorithm="norm"``) or magnitude of an entry ("value"),
        without the loss scale; all terms take one factor. ``ValueError`` tells of other values, or ``low_memory=True``.
        """
        self._options.refuse_with_low_memory("clipping")
        self._pending.clip(self._parameters(), limit, algorithm)

    def __getstate__(self) -> dict[str, Any]:
        self._parameters()
        mine = {key: self.__dict__[key] for key in ("_options", "_given_terms", "_layer_names")}
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch has added, for groups that come later
        self._layer_names.seen, self._layer_names.groups = [], []
        self._reset_transient()
        self._pending.spent = Spent(one for group in self.param_groups for one in group["params"])

    def _reset_transient(self) -> None:
        self._pending = ShownGradients(fixed=self._options.fixes_squares)
        self._last_scales: dict[str, Tensor] = {}
        self._watch = FiniteWatch(skips=self._options.on_nonfinite == "skip")
        self._kept: list[Any] = []  # the key of the updater, the updater, and the moments that the key names
        self._counted: dict[str, Any] = {}  # what was counted before the last step
        self._ranks = Ranks(late=True)

    def _take(self, batch: Batch, others: Mapping[int, Tensor]) -> None:
        """Differentiate the losses, and show the balanced gradient; ``others`` were in ``p.grad`` before."""
        pending, known, goes_on = self._pending, self.terms, self._pending.shown is not None
        if not self.state:  # also where a user has cleared it
            self._watch.told = []
            begin_anew(self.param_groups)
        factors = self._factors(batch) if self._options.balance_every > 1 else None
        try:
            with as_fabric_backward():
                custom = [] if pending.seen.issuperset(batch.losses) else look_at(batch.losses, pending.seen)
                looks = custom and not (batch.retain_graph or batch.processes.sharded)
                kept = replace(batch, retain_graph=True) if looks else batch
                memory, touched = self._absorb(kept) if self._options.low_memory else self._collect(kept, factors)
                if looks:
                    tell_of_added_gradients(batch.losses, batch.parameters, custom[0])
            watched = pending.fixed or batch.processes.sharded
            pending.shown = Shown(memory, batch.parameters, touched, batch.loss_scale, watched=watched)
        except BaseException:
            if goes_on:  # earlier batches are dropped, too
                pending.spent = Spent(batch.parameters)
            pending.clear()
            if not known:  # nor are the terms now
                self.state.clear()
                self._set_terms(())
            raise
        if others:
            pending.shown.add(batch.parameters, others)

    def _collect(self, batch: Batch, factors: Mapping[str, Tensor] | None) -> tuple[GradientMemory, list[bool]]:
        """Hold the gradients of the losses, or of their sum times these factors; give the balanced gradient."""
        pending, rows = self._pending, batch.terms
        if factors is not None:
            batch, rows = replace(batch, losses=weighted_sum(batch.losses, factors)), (SUM,)
        pending.use(pending.fitting(batch, self.param_groups, len(batch.terms)).use(len(rows)), rows)
        pending.add(batch, rows)
        updater = self._prepare_updater(batch.terms)
        shown = updater.show(pending)
        if updater.joined:
            self._keep(updater)
        return shown

    def _absorb(self, batch: Batch) -> tuple[GradientMemory, list[bool]]:
        """Consume the gradients of the losses; give the balanced gradient."""
        updater = self._prepare_updater(batch.terms)
        absorbed = LowMemory(updater, self._watch)
        if batch.averaging is not None:
            self._pending.memory = self._pending.fitting(batch, self.param_groups, 1)
        absorbed.absorb_all(batch, self._pending.memory)
        if updater.joined:
            self._keep(updater)
        self._pending.absorbed = absorbed
        return absorbed.sums, absorbed.touched

    def _prepare_updater(self, terms: tuple[str, ...] = ()) -> Updater:
        if terms and not self.terms:
            self._set_terms(terms)
        if len(self.state) < len(self._layer_names.parameters):
            self._allocate()
        return self._updater()

    def _meet_edits(self, parameters: list[Tensor], *, goes_on: bool) -> None:
        """Let what was made of ``p.grad`` since the last backward pass count, or raise before anything is changed."""
        if self._pending.meet_edits(parameters, self._layer_names, goes_on=goes_on):
            self._prepare_updater().follow_edits(self._pending, goes_on=goes_on)

    def _factors(self, batch: Batch) -> Mapping[str, Tensor] | None:
        """By what to multiply the losses, if their sum alone is to be differentiated; ``None``: each by itself."""
        self._recall()  # whether the step before counts must be known now
        pending, group, every = self._pending, self.param_groups[0], self._options.balance_every
        due = due_terms(batch.collected, group, every)
        if not pending.gradients:
            pending.light = not due and not group["awaited"]
        elif pending.light and due:
            pending.awaited.update(await_terms(due, group, every))
        scales = self._updater().tables.frozen_scales[0] if pending.light else None
        return None if scales is None else dict(zip(self.terms, scales.unbind(), strict=True))

    def _recall(self) -> None:
        """Tell of the step before if it was not finite, and that was not known then; and do not count it."""
        if self._watch.sent is None:
            return
        with self._watch.tolerating():
            try:
                self._watch.recall()
            except NonFiniteError:
                for group in self.param_groups:
                    group.update(self._counted)
                raise

    def _updater(self) -> Updater:
        """The one of the last step, unless parameters, terms, layers or states have been added, loaded or replaced."""
        if not self._kept or self._kept[0] != self._key()[0]:
            if drop_misfits(self.state, zip(self._layer_names.labels, self._layer_names.parameters, strict=True)):
                self._allocate()
            layers = self._layer_names.layers(self.param_groups)
            with torch.inference_mode(False):  # what an evaluation makes must be changed by the next step
                names, terms = self._layer_names.labels, self.terms
                updater = Updater(Tables(self._options, self.param_groups, self.state, layers, names, terms))
            self._keep(updater)
        return self._kept[1]  # type: ignore[no-any-return]

    def _keep(self, updater: Updater) -> None:
        """Keep it, with what moments are there: it may have joined some."""
        updater.joined = False
        key, moments = self._key()
        self._kept[:] = key, updater, moments  # the tables hold what else the key names

    def _key(self) -> tuple[object, list[Tensor | None]]:
        """What an updater belongs to, and the clocks and moments in the state: one that was replaced counts."""
        parameters = self._layer_names.parameters  # as they were when they were last asked for
        identity, kept = identity_of(parameters, self.state, ("step", *MOMENT_KEYS))
        return (self._layer_names.found, self.param_groups[0]["terms"], identity), kept

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

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group, self._options, self.terms)

    def _holds_gradients(self) -> bool:
        if all(parameter.grad is None for parameter in self._layer_names.parameters):  # reset behind its back
            self._pending.drop_gradients()
        return self._pending.shown is not None

    def _take_in(self, count: int) -> None:
        self._pending.extend(count)
        if self._given_terms:
            self._allocate()

    def _check(self, batch: Batch) -> Parameters:
        finite = batch.loss_scale is None and self._options.on_nonfinite == "raise" and are_on_host(batch.parameters)
        known = self.terms
        check_losses(batch.losses, known or None, finite=finite, graph=not batch.replicated)
        if not self._last_scales:  # what holds for the first step holds for all
            self._options.check_terms(known or tuple(batch.losses))
        if self._layer_names.found is None:
            self._layer_names.layers(self.param_groups)
        if batch.processes.group is None:
            return ()
        self._ranks.early = hangs_on(batch.losses, self.param_groups[0], self._options.balance_every)
        if self._ranks.parameters is None:
            self._ranks.options = told_options({**vars(self._options), "terms": self._given_terms}, self.param_groups)
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
            raise nothing_to_consume(self)
