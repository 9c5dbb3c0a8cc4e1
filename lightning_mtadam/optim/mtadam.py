"""MTAdam: Adam for several loss terms, balanced per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from operator import itemgetter, ne
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_mtadam import balancing
from lightning_mtadam.checkpoint import check_options_of_groups
from lightning_mtadam.collect import Batch
from lightning_mtadam.distributed.agreement import Parameters
from lightning_mtadam.distributed.uninterrupted import uninterrupted
from lightning_mtadam.edits.shown import Spent
from lightning_mtadam.graphs import LOOKS, tell_of_ramps
from lightning_mtadam.groups import COUNTED, check_numbers, count, materialized
from lightning_mtadam.importance import ImportanceOptimizer, check_importance, importance_of_checkpoint
from lightning_mtadam.layers import LayerRule
from lightning_mtadam.layout import own_memory
from lightning_mtadam.optim.held import ObservedOptimizer
from lightning_mtadam.optim.options import Denominator, OnNonfinite, Options, Update
from lightning_mtadam.optim.state import check_checkpoint, restore
from lightning_mtadam.optim.tables import Tables
from lightning_mtadam.terms import plain


class MTAdam(ImportanceOptimizer, ObservedOptimizer):
    """Adam for several loss terms: per layer, every term's gradient is brought to the magnitude of an anchor's.

    For a layer and a term ``i`` with gradient ``g_i``::

        n_i   <- beta3 n_i + (1 - beta3) ||g_i||
        g~_i  <- importance_i (n_anchor / n_i) g_i
        M     <- beta1 M + (1 - beta1) sum_i g~_i
        v_i   <- beta2 v_i + (1 - beta2) g~_i^2
        theta <- theta - lr M^ / (sqrt(max_i v^_i) + eps)

    where ``^`` is Adam's bias correction. With one term this is :class:`torch.optim.Adam` (:class:`~torch.optim.AdamW`
    with ``weight_decay``). A constant factor on a loss other than the anchor changes nothing, up to rounding, and to
    ``eps`` in layers that the anchor does not reach.

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
        importance: wanted ratios after balancing, by term; 1 by default. :meth:`set_importance` changes it.
        layers: the unit that is balanced: "parameter" (the default), "module" (a module's weight and bias together),
            "group", "global", or a callable from a parameter's name to a layer's name. Where it has several parameters
            terms are compared on those that both reach.
        norm_init: the gradient norms' average starts from the "first" one (the default), is "unbiased" (corrected for
            its start at zero; the default with ``balance_every``), or starts at "one" (the paper's Algorithm 1).
        denominator: which second moments divide the step: the "max" over the terms (the default), their "mean", each
            term's "own", or the one of the "sum" of the balanced terms, as in Adam.
        update: the "sum" of the terms, or their "mean", divided by the number of terms that reach the parameter.
        max_scale: cap on ``n_anchor / n_i``.
        amsgrad: divide by the largest second moments so far.
        maximize: maximize the losses.
        on_nonfinite: what :meth:`step` does where a term's gradient is inf or nan: "raise", or "skip" the step, which
            then changes nothing, and warn at the first. On an accelerator this happens one step later.
        balance_every: measure the balance at most every so many steps (more often in the beginning), by one backward
            pass per term, and take one backward pass of the sum in the steps between, each loss times its last scale.
            Not the paper's algorithm: it has ``layers="global"`` and ``denominator="sum"``, and costs little more than
            Adam. A term that was never measured, or not for so many steps, is measured in the step it comes in; one
            that comes in a later batch of an accumulated step, in a step after it.
        low_memory: consume each term's gradient as soon as it is there, which saves the memory of I gradients. The host
            waits for each term, and what needs all gradients at once is refused: accumulation, scalers, clipping. After
            a backward pass that fails, or that no step follows, second moments have seen the terms before.
        compile: join the update to one kernel, and the balance to two calls, by :func:`torch.compile`, which takes some
            seconds at the first step; these are compiled anew after a load, or when parameters are added.

    Raises:
        ValueError: an option is out of range, or names a term that is not in ``terms``.
        TypeError: a parameter is complex, or an option has the wrong type.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = MTAdam(model.named_parameters(), lr=1e-2)
        >>> output = model(torch.ones(8, 4))
        >>> optimizer.zero_grad()
        >>> optimizer.backward({"fit": (output - 1).square().mean(), "small": 1e4 * output.abs().mean()})
        >>> optimizer.step()
        >>> optimizer.terms, list(optimizer.balance_weights())
        (('fit', 'small'), ['weight', 'bias'])

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
        lightly = balance_every != 1
        layers = layers or ("global" if lightly else "parameter")
        norm_init = norm_init or ("unbiased" if lightly else "first")
        denominator = denominator or ("sum" if lightly else "max")
        wanted = check_importance({} if importance is None else importance)
        balance = (anchor, wanted, layers, norm_init, denominator, update, plain(max_scale))
        options = Options(*balance, on_nonfinite, compile, plain(balance_every), low_memory)
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        kept = {"maximize": maximize, **COUNTED, "importance": dict(options.importance)}
        super().__init__(params, {**numbers, **kept}, options, terms)
        self._name_importance(self.terms)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Balance the gradients that :meth:`backward` has collected, and update moments and parameters.

        A ``closure``, which computes the losses and calls :meth:`backward`, is called first.

        Raises:
            RuntimeError: there is nothing to consume.
            NonFiniteError: a term's gradient is inf or nan, with ``on_nonfinite="raise"``. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters, collected = self._parameters(), self._pending.shown is not None
        if collected:
            self._meet_edits(parameters, goes_on=False)
        if self._pending.shown is not None:
            self._update()
            self._pending.spent = Spent(parameters)
        else:  # a closure may reset all gradients to skip the step
            self._check_nothing_to_do(skipped=closure is not None and (loss is None or collected))
        self._pending.clear()
        return loss

    @uninterrupted()
    def _update(self) -> None:
        """Algorithm 1, for the gradients that are pending."""
        if self._watch.sent is not None:
            self._recall()
        absorbed = self._pending.absorbed
        updater = self._prepare_updater() if absorbed is None else absorbed.updater
        stepper = updater if absorbed is None else absorbed
        with self._watch.tolerating():
            norms, finite = stepper.observe(self._pending, self._watch)  # lines 5 to 8: g, ||g|| and p.grad
            scales, coefficients = stepper.balance(self._pending, norms, finite)  # lines 7, 11 and 12
            stepper.run(coefficients)  # lines 9 to 14, chunk by chunk
            lightly = self._pending.light or self._options.balance_every == 1
            measured = () if lightly else tuple(self._pending.gradients)
            count(self.param_groups, self._counted, measured, self._pending.awaited)  # line 3: t
            if updater.joined:
                self._keep(updater)
            self._last_scales.update(zip(updater.tables.layers.names, scales.unbind(), strict=True))

    def synchronize(self) -> None:
        """Wait for an accelerator, and raise or warn now, as ``on_nonfinite`` says, if the last step was not finite.

        The step itself does not wait. :meth:`state_dict` calls this, and Lightning's module at the end of training.
        """
        self._recall()

    def gradient_norms(self) -> dict[str, Tensor]:
        """The moving averages n_i of the terms' gradient norms, by layer: tensors [I]; zero where never reached."""
        return self._read(Tables.corrected_norms)

    def balance_weights(self) -> dict[str, Tensor]:
        """The balance weights n_i / n_anchor, or n_i / n_1 without an anchor, by layer: [I].

        Of a layer of several parameters, the norms are of those that both reach. nan where a term never reached, or is
        left out as rounding noise (``docs/how_it_works.md``), with scale 0.
        """
        return self._read(Tables.balance_weights)

    def term_weights(self) -> dict[str, Tensor]:
        """Empty: no scalar multiplies a loss. :func:`lightning_mtadam.export_weights` makes such weights."""
        return {}

    def scales(self) -> dict[str, Tensor]:
        """What multiplied the terms' gradients in the last step, clipping by norm included, by layer: tensors [I]."""
        return {name: scales.clone() for name, scales in self._last_scales.items()}

    def average_weights(self) -> dict[str, Tensor]:
        """The scales' geometric mean over the steps since the term came, without clipping, by term: [L], one per layer.

        Float64, on the host, in the order of :meth:`layer_sizes`; nan where the term never reached the layer.
        :func:`lightning_mtadam.export_weights` reads them.
        """
        if not any(self.state.values()):
            return {}
        return dict(zip(self.terms, self._tables().average_scales().unbind(1), strict=True))

    def layer_sizes(self) -> Tensor:
        """The number of elements of each layer: [L], float64, on the host."""
        found = materialized(self._parameters())
        sizes = torch.tensor([p.numel() for p in found], dtype=torch.float64, device="cpu")
        layers = self._layer_names.layers(self.param_groups)
        return sizes.new_zeros(len(layers.names)).index_add_(0, layers.layer_of.to("cpu"), sizes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for every torch optimizer; with or without names, whatever the others have."""
        if self._pending.absorbed is not None:
            self._options.refuse_with_low_memory("a parameter group that is added between backward() and step()")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer. Moments that share memory are copied; numbers are Python's."""
        self.synchronize()
        self._parameters()
        found = super().state_dict()
        states = found["state"].items()
        kept = {index: {key: own_memory(one) for key, one in state.items()} for index, state in states}
        return {**found, "state": kept, "param_groups": plain(found["param_groups"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; training goes on bit for bit. ``ValueError`` names what differs; nothing is changed."""
        self._parameters()
        check_checkpoint(state_dict, self.param_groups, self._layer_names.labels, self._options, self.terms)
        groups, beside = state_dict["param_groups"], {*COUNTED, "importance"}
        check_options_of_groups(groups, self.defaults.keys() - beside, check_numbers)
        importance = importance_of_checkpoint(groups, self.param_groups)
        super().load_state_dict(state_dict)
        restore(self.state, self.param_groups, state_dict, self._options)
        for group in self.param_groups:
            if any(isinstance(one, str) for one in group.get("measured", ())):  # as it was written down before
                group["measured"] = ()
            group.update({key: group.get(key, value) for key, value in COUNTED.items()})
        self._want(importance)
        self._take_importance(groups[0]["terms"])
        self._set_terms(tuple(self.param_groups[0]["terms"]) or self._given_terms)

    def __repr__(self) -> str:
        """The options and the groups' hyper-parameters, without what is only counted."""
        hidden = {"params", "param_names", *COUNTED, "terms", "importance", *self._options.state_meaning}
        options = {**vars(self._options), "importance": self.param_groups[0]["importance"]}
        lines = [f"    {name}: {value!r}" for name, value in [("terms", self.terms), *options.items()]]
        for index, group in enumerate(self.param_groups):
            numbers = [f"    {key}: {value!r}" for key, value in group.items() if key not in hidden]
            lines += [f"Parameter Group {index} ({len(group['params'])} parameters)", *numbers]
        return "\n".join([f"{type(self).__name__} (", *lines, ")"])

    def _reset_transient(self) -> None:
        super()._reset_transient()
        self._ramps: dict[str, list[float]] = {}  # by which numbers losses were multiplied

    def _set_terms(self, terms: tuple[str, ...]) -> None:
        super()._set_terms(terms)
        self._name_importance(terms)

    def _check(self, batch: Batch) -> Parameters:
        """As before; then the importance is taken from the groups, and holds for this batch."""
        found, groups, held = super()._check(batch), self.param_groups, self._options.importance
        try:
            changed = any(map(ne, map(itemgetter("importance"), groups), repeat(held)))
        except (RuntimeError, ValueError):  # tensors and arrays cannot be compared
            changed = True
        if changed:
            self._take_importance(self.terms or tuple(batch.losses))
            for updater in self._kept[1:2]:
                updater.tables.follow_importance()
        if batch.processes.group is not None:
            self._ranks.changing = (("importance", str(sorted(held.items()))),)
        if self._options.anchor is not None and groups[0]["steps"] % LOOKS == 0:
            tell_of_ramps(batch.losses, self._ramps)
        return found

    def _read(self, method: Callable[[Tables], Tensor]) -> dict[str, Tensor]:
        """What a method of the tables gives, [L, I], by layer; empty before the first step or preallocation."""
        if not any(self.state.values()):
            return {}
        tables = self._tables()
        return dict(zip(tables.layers.names, method(tables).clone().unbind(), strict=True))

    def _tables(self) -> Tables:
        """Those of the parameters as they are now."""
        self._parameters()
        return self._updater().tables
