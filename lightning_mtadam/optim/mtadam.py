"""MTAdam: Adam for several loss terms, balanced per layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_mtadam import balancing
from lightning_mtadam.distributed.averaging import Averaging
from lightning_mtadam.optim.checkpoint import check_checkpoint
from lightning_mtadam.optim.collecting import TermOptimizer
from lightning_mtadam.optim.finite import FiniteWatch
from lightning_mtadam.optim.layers import named_alike
from lightning_mtadam.optim.options import (
    Denominator,
    LayerRule,
    OnNonfinite,
    Options,
    Update,
    check_group,
    check_terms,
)
from lightning_mtadam.optim.pending import Found, check_reached
from lightning_mtadam.optim.schedule import SUM, is_measured
from lightning_mtadam.optim.state import allocate, restore
from lightning_mtadam.optim.step import Stepper
from lightning_mtadam.optim.streaming import Streaming
from lightning_mtadam.optim.uninterrupted import uninterrupted
from lightning_mtadam.terms import NonFiniteError


class MTAdam(TermOptimizer):
    r"""Adam for several loss terms: per layer, every term's gradient is brought to the magnitude of an anchor's.

    For a layer and a term :math:`i` with gradient :math:`g_i`::

        n_i   <- beta3 n_i + (1 - beta3) ||g_i||
        g~_i  <- importance_i (n_anchor / n_i) g_i
        M     <- beta1 M + (1 - beta1) sum_i g~_i
        v_i   <- beta2 v_i + (1 - beta2) g~_i^2
        theta <- theta - lr M^ / (sqrt(max_i v^_i) + eps)

    where ``^`` is Adam's bias correction. With one term this is :class:`torch.optim.Adam` (:class:`~torch.optim.AdamW`
    with ``weight_decay``). A constant factor on a loss other than the anchor changes nothing.

    Args:
        params: parameters, named parameters, or parameter groups, as for every torch optimizer. With
            ``model.named_parameters()`` the layers carry the parameters' names.
        lr: learning rate.
        betas: decay of the first moment, of the second moments, and of the gradient norms.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, applied once, whatever the number of terms.
        terms: the names of the losses, if known ahead: the state is then allocated here, and terms may be absent at
            first. Otherwise they are taken from the first losses.
        anchor: whose magnitude the others are brought to: "first" (the first term), a term's name, "mean" (the
            geometric mean), "max", "unit" (scale to norm one), or ``None`` (no balancing).
        importance: wanted ratios after balancing, by term; 1 by default.
        layers: the unit that is balanced: "parameter" (the default), "module" (a module's weight and bias together),
            "group", "global", or a callable from a parameter's name to a layer's name.
        norm_init: the gradient norms' average starts from the "first" one, is "unbiased" (corrected for its start at
            zero), or starts at "one" (the paper's Algorithm 1). By default "first", or "unbiased" with
            ``balance_every`` above 1.
        denominator: which second moments divide the step: the "max" over the terms (the default), their "mean", each
            term's "own", or the one of the "sum" of the balanced terms, as in Adam.
        update: the "sum" of the terms, or their "mean", divided by the number of terms that reach the parameter.
        max_scale: cap on ``n_anchor / n_i``.
        amsgrad: divide by the largest second moments so far.
        maximize: maximize the losses.
        on_nonfinite: what :meth:`step` does where a term's gradient is inf or nan: "raise", or "skip" the step, which
            then changes nothing, and warn at the first. On an accelerator, which the host does not wait for, this
            happens one step later.
        balance_every: measure the balance at most every so many steps (more often in the beginning), by one backward
            pass per term, and take a single backward pass of the sum in the steps between, each loss multiplied by its
            last scale. This is no longer the paper's algorithm: it has ``layers="global"`` and ``denominator="sum"``,
            and costs little more than Adam. A term that was never measured is measured in the step it comes in. Under
            accumulation, if it is not in the step's first batch or if there are several processes, it is left out until
            the next measured step.
        low_memory: consume each term's gradient as soon as it is there: I gradients fewer are held. Then ``p.grad`` is
            the balanced sum; accumulation, gradient scalers, clipping and options that need all gradients at once are
            refused, and the host waits for each term. If the gradient of a later term is inf or nan, second moments
            have seen those before it; after a backward pass that no step follows, they have seen all.
        compile: join the update to one kernel, and the balance to one call, by :func:`torch.compile`, which takes some
            seconds at the first step; the call is compiled anew after a load, or when parameters are added.

    Raises:
        ValueError: an option is out of range, or names a term that is not in ``terms``.
        TypeError: a parameter is complex, or an option has the wrong type.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(4, 2)
        >>> optimizer = MTAdam(model.named_parameters(), lr=1e-2)
        >>> output = model(torch.ones(8, 4))
        >>> optimizer.zero_grad()
        >>> optimizer.backward({"fit": (output - 1).square().mean(), "small": 1e4 * output.abs().mean()})
        >>> optimizer.step()
        >>> optimizer.terms
        ('fit', 'small')
        >>> list(optimizer.balance_weights())
        ['weight', 'bias']

    References:
        Malkiel and Wolf, MTAdam: Automatic Balancing of Multiple Training Loss Terms, EMNLP 2021, Algorithm 1. What
        departs from it, and why, is in ``docs/how_it_works.md``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        terms: Iterable[str] | None = None,
        anchor: str | None = "first",
        importance: Mapping[str, float] | None = None,
        layers: LayerRule | None = None,
        norm_init: balancing.NormInit | None = None,
        denominator: Denominator | None = None,
        update: Update = "sum",
        max_scale: float = math.inf,
        amsgrad: bool = False,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "raise",
        compile: bool = False,
        balance_every: int = 1,
        low_memory: bool = False,
    ) -> None:
        seldom = balance_every != 1
        options = Options(
            anchor=anchor,
            importance=dict(importance or {}),
            layers=layers or ("global" if seldom else "parameter"),
            norm_init=norm_init or ("unbiased" if seldom else "first"),
            denominator=denominator or ("sum" if seldom else "max"),
            update=update,
            max_scale=max_scale,
            on_nonfinite=on_nonfinite,
            compile=compile,
            balance_every=balance_every,
            low_memory=low_memory,
        )
        given = () if terms is None else check_terms(terms)
        if given:
            options.check_terms(given)
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, {**defaults, "amsgrad": amsgrad, "maximize": maximize, "steps": 0, "measured": ()}, options, given
        )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Balance the gradients that :meth:`backward` has collected, and update moments and parameters.

        Args:
            closure: computes the losses and calls :meth:`backward`; it is called first.

        Raises:
            RuntimeError: there is nothing to consume.
            NonFiniteError: a term's gradient is inf or nan, with ``on_nonfinite="raise"``. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._pending.gradients or self._pending.streaming is not None:
            self._consume()
        else:
            self._check_nothing_to_do(skipped=closure is not None and loss is None)
        self._pending.clear()
        return loss

    def gradient_norms(self) -> dict[str, Tensor]:
        """The moving averages n_i of the terms' gradient norms, by layer: tensors [I]; zero where never reached."""
        return self._read_norms(lambda norms: norms)

    def balance_weights(self) -> dict[str, Tensor]:
        """The balance weights n_i / n_anchor, by layer: tensors [I]; nan where the term never reached the layer.

        With anchor "unit" or ``None`` they are relative to the first term.
        """
        terms = self.terms
        reference = self._options.reference(terms) if terms else 0
        return self._read_norms(
            lambda norms: balancing.balance_weights(norms, balancing.reference_norms(norms, reference))
        )

    def scales(self) -> dict[str, Tensor]:
        """What multiplied the terms' gradients in the last step, clipping by norm included, by layer: tensors [I]."""
        return {name: scales.clone() for name, scales in self._last_scales.items()}

    def average_weights(self) -> dict[str, Tensor]:
        """The scales' geometric mean over all steps so far, clipping left out, by term: tensors [L], one per layer.

        They are float64, on the host, in the order of :meth:`layer_sizes`; nan where the term never reached the layer.
        Of a term that came late only the steps since then are averaged. Empty before the first step.
        :func:`lightning_mtadam.export_weights` makes one constant weight per term of them.
        """
        if not any(self.state.values()):
            return {}
        return dict(zip(self.terms, self._stepper().balance.average_scales().unbind(1), strict=True))

    def layer_sizes(self) -> Tensor:
        """The number of elements of each layer: [L], float64, on the host."""
        layers = self._book.layers(self.param_groups)
        sizes = torch.tensor([p.numel() for p in self._parameters()], dtype=torch.float64, device="cpu")
        return sizes.new_zeros(len(layers.names)).index_add_(0, layers.layer_of.to("cpu"), sizes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for every torch optimizer; with or without names, whatever the others have."""
        if self._pending.streaming is not None:
            self._refuse_if_streaming("a parameter group that is added between backward() and step()")
        named = [group for group in self.param_groups if "param_names" in group]
        super().add_param_group(named_alike(param_group, len(self._book.names)) if named else param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self._options, self.defaults["terms"])
        except Exception:
            self.param_groups.pop()
            raise
        self._book.add(group)
        self._pending.extend(len(group["params"]))
        if self.terms:
            self._set_terms(self.terms)

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer. The moments of small parameters, which share memory, are copied."""
        found = super().state_dict()
        states = found["state"].items()
        return {
            **found,
            "state": {index: {key: one.contiguous() for key, one in state.items()} for index, state in states},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; training then continues bit for bit.

        Raises:
            ValueError: other terms, shapes, parameters or options; the message names them. Nothing was changed.
        """
        check_checkpoint(state_dict, self.param_groups, self._book.labels, self._options, self.terms)
        super().load_state_dict(state_dict)
        restore(self.state, self.param_groups, state_dict)
        self._set_terms(self.terms or self._given_terms)

    @uninterrupted()
    def _consume(self) -> None:
        self._recall(stacklevel=8)
        self._allocate()
        stepper = self._stepper()
        try:
            if self._pending.streaming is not None:
                scales = self._pending.streaming.finish()
            else:
                scales = stepper.step(self._pending, self._watch)
        except NonFiniteError as error:
            if self._options.on_nonfinite == "raise":
                raise
            self._warn_of_skip(error, stacklevel=7)
        else:
            self._count_step()
            self._last_scales.update(zip(stepper.balance.layers.names, scales.unbind(), strict=True))

    def _recall(self, stacklevel: int) -> None:
        """Tell of the step before if it was not finite, and that was not known then; and do not count it."""
        try:
            self._watch.recall()
        except NonFiniteError as error:
            for group in self.param_groups:
                group.update(self._counted)
            if self._options.on_nonfinite == "raise":
                raise
            self._warn_of_skip(error, stacklevel)

    def _count_step(self) -> None:
        self._counted.update({key: self.param_groups[0][key] for key in ("steps", "measured")})
        light = SUM in self._pending.gradients
        measured = () if light else tuple(term for term in self.terms if term in self._pending.gradients)
        for group in self.param_groups:
            group["steps"] += 1
            group["measured"] = tuple(dict.fromkeys((*group["measured"], *measured)))

    def _collect(
        self,
        found: Found,
        names: tuple[str, ...],
        rows: tuple[str, ...],
        loss_scale: Tensor | None,
        averaging: Averaging | None,
        *,
        may_miss: bool,
    ) -> None:
        if not self._options.low_memory:
            return super()._collect(found, names, rows, loss_scale, averaging, may_miss=may_miss)
        known = self.terms
        self._set_terms(rows)
        self._allocate()
        streaming = Streaming(self._stepper())
        try:
            for name in names:
                streaming.absorb(name, self._one(found, name, averaging, may_miss))
            next(found, None)
        except BaseException:
            found.close()
            if not known:  # nor are the terms now
                self.state.clear()
                self._set_terms(())
            raise
        streaming.absorb_late()
        streaming.show_sum()
        self._pending.streaming = streaming

    def _one(self, found: Found, name: str, averaging: Averaging | None, may_miss: bool) -> list[Tensor | None]:
        """The next term's gradients, averaged."""
        _, gradients = next(found)
        if not may_miss:
            check_reached(name, gradients)
        if averaging is None:
            return gradients
        memory = self._memory(1)
        self._pending.memory = memory
        for view, gradient in zip(memory.views[0], gradients, strict=True):
            if view is not None and gradient is not None:
                view.copy_(gradient)
        memory.wrote(0, [gradient is not None for gradient in gradients])
        averaging.send(name, gradients, memory, 0)
        averaged = averaging.receive()[name]
        check_reached(name, averaged)
        memory.wrote(0, [gradient is not None for gradient in averaged])
        return averaged

    def _in_order(self, terms: tuple[str, ...]) -> tuple[str, ...]:
        reference = self._options.reference(terms)
        if self._options.low_memory and isinstance(reference, int):  # its norms are needed first
            return tuple(dict.fromkeys((terms[reference], *terms)))
        return terms

    def _refuse_if_streaming(self, what: str) -> None:
        """Raise if each gradient is consumed at once."""
        if self._options.low_memory:
            raise ValueError(
                f"low_memory=True consumes each term's gradient as soon as it is there, but {what} needs those of all"
                " terms at once. Leave out low_memory=True, or do without."
            )

    def _factors(self, terms: Sequence[str], *, agreed: bool) -> Mapping[str, Tensor] | None:
        group = self.param_groups[0]
        if self._options.balance_every > 1:  # whether the step before counts must be known now
            self._recall(stacklevel=6)
        if self._pending.gradients:
            light = SUM in self._pending.gradients
        else:
            unmeasured = agreed and not set(terms) <= set(group["measured"])
            light = not is_measured(group["steps"], self._options.balance_every) and not unmeasured
        return dict(zip(self.terms, self._stepper().frozen_scales[0].unbind(), strict=True)) if light else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # checkpoints from before they were counted
            group.setdefault("steps", 0)
            group.setdefault("measured", ())

    def _reset_transient(self) -> None:
        super()._reset_transient()
        self._watch = FiniteWatch()
        self._steppers: list[Stepper] = []  # one, or none
        self._counted: dict[str, Any] = {}  # what was counted before the last step

    def _warn_of_skip(self, error: NonFiniteError, stacklevel: int) -> None:
        if not self._pending.warned:
            self._pending.warned = True
            warnings.warn(f"A step was skipped; others will be without a word. {error}", stacklevel=stacklevel)

    def _stepper(self) -> Stepper:
        """The one of the last step, unless something was added, loaded or replaced."""
        layers = self._book.layers(self.param_groups)
        if not self._steppers or not self._steppers[0].fits(self.param_groups, self.state, layers, self.terms):
            names = self._book.labels
            with torch.inference_mode(False):  # what an evaluation makes must be changed by the next step
                self._steppers[:] = [Stepper(self._options, self.param_groups, self.state, layers, names, self.terms)]
        return self._steppers[0]

    def _set_terms(self, terms: tuple[str, ...]) -> None:
        super()._set_terms(terms)
        if self._given_terms:
            self._allocate()

    def _allocate(self) -> None:
        """Make the state of the parameters that are trained, or have gradients pending."""
        parameters, touched = self._parameters(), self._pending.touched
        reached = touched + [False] * (len(parameters) - len(touched))
        needed = [flag or parameter.requires_grad for flag, parameter in zip(reached, parameters, strict=True)]
        allocate(self.state, self.param_groups, needed, self._options, len(self.terms))

    def _read_norms(self, read: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Apply ``read`` to the norms [L, I], and name the rows; empty before the first step or preallocation."""
        if not any(self.state.values()):
            return {}
        stepper = self._stepper()
        return dict(
            zip(stepper.balance.layers.names, read(stepper.balance.corrected_norms()).clone().unbind(), strict=True)
        )
