"""MTAdam: Adam for several loss terms, balanced per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_mtadam import balancing
from lightning_mtadam.distributed import agree_on_terms, average_gradients
from lightning_mtadam.gradients import refuse_reentrant_checkpoints, term_gradients
from lightning_mtadam.optim.checkpoint import check_checkpoint
from lightning_mtadam.optim.layers import LayerBook, named_alike
from lightning_mtadam.optim.options import Denominator, LayerRule, Options, Update, check_group, check_terms
from lightning_mtadam.optim.pending import ClipAlgorithm, PendingGradients
from lightning_mtadam.optim.state import allocate, restore
from lightning_mtadam.optim.step import Stepper
from lightning_mtadam.terms import Losses, check_losses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MTAdam(Optimizer):
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
        layers: the unit that is balanced: "parameter", "module" (a module's weight and bias together), "group",
            "global", or a callable from a parameter's name to a layer's name.
        norm_init: the gradient norms' average starts from the "first" one, is "unbiased" (corrected for its start at
            zero), or starts at "one" (the paper's Algorithm 1).
        denominator: which second moments divide the step: the "max" over the terms, their "mean", or each term's "own".
        update: the "sum" of the terms, or their "mean", divided by the number of terms that reach the parameter.
        max_scale: cap on ``n_anchor / n_i``.
        amsgrad: divide by the largest second moments so far.
        maximize: maximize the losses.

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
        layers: LayerRule = "parameter",
        norm_init: balancing.NormInit = "first",
        denominator: Denominator = "max",
        update: Update = "sum",
        max_scale: float = math.inf,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        # Lightning wraps optimizers in an object that has this class but not these attributes: methods may change
        # what they hold, but never assign them anew.
        self._options = Options(anchor, dict(importance or {}), layers, norm_init, denominator, update, max_scale)
        self._given_terms = () if terms is None else check_terms(terms)
        if self._given_terms:
            self._options.check_terms(self._given_terms)
        self._book = LayerBook(layers)
        self._reset_transient()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        defaults |= {"maximize": maximize, "terms": self._given_terms, **self._options.state_meaning}
        super().__init__(params, defaults)

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the loss terms, in order; empty until they are known."""
        return tuple(self.param_groups[0]["terms"])

    def backward(
        self,
        losses: Losses,
        *,
        grad_output: Tensor | None = None,
        loss_scale: Tensor | None = None,
        group: ProcessGroup | None = None,
        sync: bool = True,
    ) -> None:
        """Differentiate each loss by itself and hold its gradients for :meth:`step`; in place of ``sum.backward()``.

        ``p.grad`` gets the sum over the terms, for whoever looks at it. Gradients add up over several calls until
        :meth:`step` consumes them, or :meth:`zero_grad` drops them.

        Args:
            losses: named scalar losses. Terms may be absent; a name that is not in :attr:`terms` is an error.
            grad_output: scalar by which every loss is multiplied, e.g. one over the number of accumulated batches.
            loss_scale: what a gradient scaler multiplied into ``grad_output``: the terms' gradients are divided by
                it, ``p.grad`` is not.
            group: processes that train together. They agree on the terms in every call.
            sync: whether to average over the group what has accumulated. False as long as batches accumulate; True in
                the last call before :meth:`step`.

        Raises:
            ValueError: no losses, a loss that is no scalar, has no graph or reaches no parameter, an unknown name;
                the ranks of the group have different terms.
            TypeError: a loss that is no real floating-point tensor.
            NonFiniteError: a loss that is inf or nan, unless there is a ``loss_scale``.
        """
        parameters = self._parameters()
        self._pending.start_anew_if_reset(parameters)
        order = self._check(losses, loss_scale, group)
        names = [name for name in order if name in losses]
        found = term_gradients({name: losses[name] for name in names}, parameters, grad_output=grad_output)
        average = partial(average_gradients, parameters=parameters, group=group) if group is not None and sync else None
        self._pending.collect(found, names, order, parameters, loss_scale, average)
        self._set_terms(self.terms or order)

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
            NonFiniteError: a term's gradient is inf or nan. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._pending.gradients:
            self._check_nothing_to_do(skipped=closure is not None and loss is None)
            self._pending.clear()
            return loss
        self._allocate()
        stepper = self._stepper()
        self._last_scales.update(zip(stepper.layers.names, stepper.step(self._pending).unbind(), strict=True))
        self._pending.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the collected gradients, and reset ``p.grad`` as every torch optimizer does."""
        self._pending.clear()
        super().zero_grad(set_to_none)

    def skip_step(self) -> None:
        """Forget the collected gradients, and let the next :meth:`step` do nothing.

        For loops that call ``step`` though there was no backward pass, as in the last epoch of Lightning's stochastic
        weight averaging.
        """
        self._pending.clear()
        self._pending.skip = True

    def clip_gradients(self, limit: float, algorithm: ClipAlgorithm = "norm") -> None:
        """Clip the balanced gradient, the sum over the terms, in the next :meth:`step`.

        All terms take the same factor, so that clipping does not disturb the balance. Clipping ``p.grad`` has no
        effect here.

        Args:
            limit: the largest L2 norm over all parameters ("norm"), or the largest magnitude of an entry ("value").
            algorithm: "norm" or "value".
        """
        if algorithm not in ("norm", "value"):
            raise ValueError(f"algorithm must be 'norm' or 'value', but got {algorithm!r}.")
        if not limit > 0:
            raise ValueError(f"limit must be above 0, but got {limit!r}.")
        self._pending.clip = (algorithm, float(limit))

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

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Name the parameters that have no name yet, as ``model.named_parameters()`` does."""
        self._book.name(named_parameters, self._parameters())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for every torch optimizer; with or without names, whatever the others have."""
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; training then continues bit for bit.

        Raises:
            ValueError: other terms, shapes, parameters or options; the message names them. Nothing was changed.
        """
        check_checkpoint(state_dict, self.param_groups, self._book.labels, self._options.state_meaning, self.terms)
        super().load_state_dict(state_dict)
        restore(self.state, self.param_groups, state_dict)
        self._set_terms(self.terms or self._given_terms)

    def __getstate__(self) -> dict[str, Any]:
        mine = {key: self.__dict__[key] for key in ("_options", "_given_terms", "_book")}
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_transient()

    def _reset_transient(self) -> None:
        self._pending = PendingGradients()
        self._last_scales: dict[str, Tensor] = {}

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _stepper(self) -> Stepper:
        layers = self._book.layers(self.param_groups)
        return Stepper(self._options, self.param_groups, self.state, layers, self._book.labels, self.terms)

    def _check(self, losses: Losses, loss_scale: Tensor | None, group: ProcessGroup | None) -> tuple[str, ...]:
        """Raise, on all ranks of the group, unless the losses are good on all of them.

        Returns:
            The names of these losses and of what is pending, in an order on which all ranks agree.
        """
        error = None
        names: tuple[str, ...] = ()
        try:
            check_losses(losses, self.terms or None, finite=loss_scale is None)
            self._options.check_terms(self.terms or tuple(losses))
            self._book.layers(self.param_groups)
            if not self._last_scales:  # a walk over the whole graph: before the first step only
                refuse_reentrant_checkpoints(losses)
            names = tuple(dict.fromkeys((*self._pending.gradients, *losses)))
        except (TypeError, ValueError) as found:
            if group is None:
                raise
            error = found
        return names if group is None else agree_on_terms(names, group, self._parameters()[0].device, error)

    def _set_terms(self, terms: tuple[str, ...]) -> None:
        self.defaults["terms"] = terms
        for group in self.param_groups:
            group["terms"] = terms
        if self._given_terms:
            self._allocate()

    def _allocate(self) -> None:
        own = self._options.denominator == "own"
        allocate(self.state, self.param_groups, self._pending.touched, len(self.terms), own=own)

    def _read_norms(self, read: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Apply ``read`` to the norms [L, I], and name the rows; empty before the first step or preallocation."""
        if not any(self.state.values()):
            return {}
        stepper = self._stepper()
        return dict(zip(stepper.layers.names, read(stepper.corrected_norms()).unbind(), strict=True))

    def _check_nothing_to_do(self, *, skipped: bool) -> None:
        """Raise, unless a closure has said by returning ``None`` that there is nothing to do, or ``skip_step`` has."""
        if self._pending.skip:
            return
        if not skipped or any(p.grad is not None and bool(p.grad.any()) for p in self._parameters()):
            raise RuntimeError(
                "step() has nothing to consume: it takes the gradients of the terms, not p.grad. Before every step()"
                " call optimizer.backward({'name': loss, ...}) in place of loss.backward(), or in a LightningModule"
                " under manual optimization self.backward_terms({'name': loss, ...}, optimizer)."
            )
