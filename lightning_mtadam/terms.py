"""What all rooms share: the names of losses and parameters, their checks, and the types of what is handed on.

It imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from itertools import repeat
from numbers import Number
from operator import attrgetter, is_
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

Losses: TypeAlias = Mapping[str, Tensor]
"""One scalar tensor with a graph per term, in the order of the terms. A zero without one: the term is absent."""

Gradients: TypeAlias = Sequence[Tensor | None]
"""One gradient for each parameter; ``None`` where the term does not reach the parameter."""

TermGradients: TypeAlias = dict[str, list[Tensor | None]]
"""Per term, its gradients."""

Found: TypeAlias = Generator[tuple[str, list[Tensor | None]], None, None]
"""The terms' names and gradients, one after the other, as they are found."""

PLACEHOLDER = "parameter_"
"""What a parameter without a name is called, before its number."""


HAS_GRAPH = attrgetter("requires_grad")
"""Whether a loss, as checked, has a graph; without one it is zero, and its term is absent."""

DEVICE = attrgetter("device")
"""Where a tensor is."""

ANCHOR_POLICIES = ("first", "mean", "max", "unit")


class NonFiniteError(FloatingPointError, ValueError):
    """A loss term or its gradient is inf or nan.

    Example:
        >>> check_losses({"fit": torch.tensor(float("inf"), requires_grad=True)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_mtadam.terms.NonFiniteError: losses['fit'] is inf. Nothing was changed. ...
    """


@runtime_checkable
class BalancesTerms(Protocol):
    """What balances losses: MTAdam, or a balancer. All that is logged, exported or checked is read from here."""

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the loss terms, in order; empty until they are known."""

    def gradient_norms(self) -> dict[str, Tensor]:
        """The moving averages n_i of the gradient norms by layer, [I]; empty where there are none."""

    def balance_weights(self) -> dict[str, Tensor]:
        """The balance weights n_i / n_anchor by layer, [I]; empty where there are none."""

    def scales(self) -> dict[str, Tensor]:
        """What multiplied the terms' gradients in the last step by layer, [I]; empty where that is not known."""

    def term_weights(self) -> dict[str, Tensor]:
        """What multiplies each loss, a scalar by term; empty where layers differ."""

    def average_weights(self) -> dict[str, Tensor]:
        """The weights of each term, averaged over the steps, one per layer: [L]; empty where none are kept."""

    def name_parameters(self, named: Iterable[tuple[str, Tensor]], /) -> None:
        """Name the parameters as ``model.named_parameters()`` does, for layers and messages."""


def check_losses(
    losses: Losses, terms: Sequence[str] | None = None, *, finite: bool = True, graph: bool = True
) -> None:
    """Raise unless ``losses`` is a non-empty mapping of names to finite, real scalars with a graph, or to zeros.

    Args:
        losses: the named losses of one step.
        terms: the names that are allowed; ``None`` allows any.
        finite: whether to refuse inf and nan. A gradient scaler skips such a step by itself.
        graph: whether one loss at least must have a graph. One of several processes may have nothing but zeros.

    Raises:
        TypeError: a name that is no string; a loss that is no tensor, or is complex, integer or boolean.
        ValueError: no losses at all; a loss that is not a scalar, or that has no graph and is not zero; a name that is
            not in ``terms``.
        NonFiniteError: a loss that is inf or nan.

    Example:
        >>> w = torch.ones(3, requires_grad=True)
        >>> check_losses({"l1": w.abs().sum(), "l2": w.square().sum()}, terms=("l1", "l2"))
        >>> check_losses({"l1": w.abs().sum(), "l2": torch.zeros(())})  # l2 is absent
        >>> check_losses({"l1": w.abs()})
        Traceback (most recent call last):
            ...
        ValueError: losses['l1'] must be a scalar tensor, but has shape (3,). Reduce it, e.g. with .mean().
    """
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"losses must be a mapping of names to scalar tensors, but is {kind_of(losses)}. Write them as"
            " {'reconstruction': loss, ...}."
        )
    if not len(losses):
        raise ValueError("losses is empty. Give at least one named loss, e.g. {'reconstruction': loss}.")
    check_names(losses)
    _check_each(losses)
    if terms is not None:
        for name in losses:
            if name not in terms:
                raise ValueError(unknown_name_message("losses", name, terms))
    if graph and not any(map(HAS_GRAPH, losses.values())):
        raise ValueError(
            f"losses[{next(iter(losses))!r}] has no graph, nor has any other of {tuple(losses)}: all are constant zeros"
            " and there is nothing to train on. Compute one at least from the network's output without .detach(), .data"
            " or torch.no_grad(), or leave out this batch."
        )
    if finite:
        _check_finite(losses)


def check_names(names: Iterable[object]) -> None:
    """Raise unless every name is a non-empty string."""
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"The name of a loss term must be a non-empty string, but got {name!r}.")


def check_terms(terms: Iterable[str]) -> tuple[str, ...]:
    """Return ``terms`` as a tuple, or raise unless it is a sequence of different names."""
    if isinstance(terms, str):
        raise TypeError(f"terms must be a sequence of names, but got the string {terms!r}. Write ({terms!r},).")
    terms = tuple(terms)
    check_names(terms)
    if not terms:
        raise ValueError("terms is empty. Name at least one term, or leave it out to take the first losses' names.")
    if len(set(terms)) != len(terms):
        raise ValueError(f"terms must be different from each other, but got {terms}.")
    return terms


def plain(value: Any) -> Any:
    """Numbers of numpy's, or of tensors with one element, as Python's, also in tuples and such; all else as it is.

    Example:
        >>> plain((torch.tensor(0.5), 0.25, torch.ones(2).numpy()[0]))
        (0.5, 0.25, 1.0)
    """
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(plain, value))
    is_one = hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1
    return value.item() if is_one else value


def check_anchor(anchor: str | None, terms: Sequence[str]) -> None:
    """Raise unless the anchor is a policy, ``None`` or one of the terms."""
    if anchor in ("mean", "max", "unit") and anchor in terms:
        raise ValueError(f"anchor={anchor!r} is a policy and a term of that name: call the term something else.")
    if anchor is not None and anchor not in ANCHOR_POLICIES and anchor not in terms:
        raise ValueError(
            f"anchor must be one of {ANCHOR_POLICIES}, None or one of the terms {tuple(terms)}, but got {anchor!r}."
        )


def unknown_name_message(where: str, name: str, terms: Iterable[str]) -> str:
    """Say that ``name`` in ``where`` is no known term, which terms there are, and what to do."""
    terms = tuple(terms)
    near = difflib.get_close_matches(name, terms, n=1)
    hint, here = (f" Did you mean {near[0]!r}?", "") if near else ("", f", here terms={(*terms, name)}")
    return (
        f"{where} names the term {name!r}, but the terms are {terms}.{hint}"
        f" Terms that are not in the first losses must be named ahead: MTAdam(..., terms=(...)){here}. A balancer takes"
        " terms= as well."
    )


def kind_of(value: object) -> str:
    """What something is, with what it holds."""
    if value is None:
        return "None"
    held = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    held = f" of {tuple(value)}" if isinstance(value, Mapping) else held
    return f"a {type(value).__name__}{held}"


def what_instead(name: str, value: object) -> str:
    """What something that is no tensor is, and what to write in its place."""
    if isinstance(value, Mapping):
        flat = ", ".join(f"'{name}_{key}': ..." for key in value)
        remedy = f"Put its losses beside the others, by names of their own: {{{flat}}}."
    elif isinstance(value, list | tuple):
        remedy = "Give each of its losses a name of its own, or add them up: sum(...)."
    elif value is None:
        remedy = "Where a batch has nothing for a term, leave it out, or give a loss of zero: torch.zeros(())."
    elif isinstance(value, Number):
        remedy = (
            "Do not call .item() on it; if it is only to be looked at, leave it out of the losses and log it instead:"
            f" self.log({name!r}, ...)."
        )
    else:
        remedy = "Leave it out of the losses."
    return f"is {kind_of(value)}. {remedy}"


def check_reached(name: str, gradients: Gradients) -> None:
    """Raise unless there is any gradient."""
    if all(map(is_, gradients, repeat(None))):
        raise ValueError(
            f"losses[{name!r}] reaches no parameter of the optimizer. Compute it from the output of the network that"
            " is trained, give the network's parameters to the optimizer, or leave the term out of the losses."
        )


def steps_by_lbfgs(optimizer: Optimizer) -> bool:
    """Whether it is ``torch.optim.LBFGS``, which compares values, or this is called in a step of one that it wraps."""
    hooked = getattr(LBFGS.step, "hooked", False)  # torch notes so that there is an LBFGS in this process
    return isinstance(optimizer, LBFGS) or (hooked and is_running(LBFGS.step))


def is_running(function: Callable[..., object]) -> bool:
    """Whether a function, decorated or not, is running, and has led here."""
    code, frame = getattr(inspect.unwrap(function), "__code__", None), inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def non_finite(
    norms: Tensor, layers: Sequence[str], terms: Sequence[str], left: str = "Nothing was changed."
) -> NonFiniteError:
    """The error that names the first norm [P, I] that is inf or nan, and says in what state all is left."""
    row, column = (int(index) for index in (~norms.isfinite()).nonzero()[0])
    return NonFiniteError(
        f"The gradient of the term {terms[column]!r} at the layer {layers[row]!r} is not finite: its norm is"
        f" {float(norms[row, column])} in {norms.dtype}. {left} Look for a division by zero or a root of zero in that"
        " loss, or lower the learning rate."
    )


def warn(message: str) -> None:
    """Warn at the line of the user's that led here, past this package's frames, torch's and those of decorators."""
    packages = [f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__)]
    inside = (*packages, contextlib.__file__)
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def is_host(device: torch.device) -> bool:
    """Whether the host can read the device's tensors at once."""
    return device.type == "cpu"


def are_on_host(tensors: Sequence[Tensor]) -> bool:
    """Whether the host can read all of them at once."""
    return all(map(is_host, set(map(DEVICE, tensors))))


def clean_names(names: Sequence[str]) -> list[str]:
    """Names without what ``torch.compile`` puts into them, and ``DistributedDataParallel`` before all of them."""
    names = [name.replace("_orig_mod.", "") for name in names]
    wrapped = all(name.startswith(("module.", PLACEHOLDER)) for name in names)
    return [name.removeprefix("module.") for name in names] if wrapped else names


def _check_each(losses: Losses) -> None:
    for name, loss in losses.items():
        where = f"losses[{name!r}]"
        if not isinstance(loss, Tensor):
            raise TypeError(f"{where} must be a scalar tensor, but {what_instead(name, loss)}")
        if not loss.is_floating_point():
            raise TypeError(
                f"{where} must be a real floating-point tensor, but has dtype {loss.dtype}. If it is only to be looked"
                f" at, leave it out of the losses and log it instead: self.log({name!r}, ...)."
            )
        if loss.dim() != 0:
            raise ValueError(
                f"{where} must be a scalar tensor, but has shape {tuple(loss.shape)}. Reduce it, e.g. with .mean()."
            )
        if hasattr(loss, "full_tensor"):
            raise TypeError(
                f"{where} is a DTensor, of which every process holds a part: it was computed from sharded parameters."
                " Make it whole with .full_tensor()."
            )
        if not loss.requires_grad and bool(loss):  # a zero is absent; the host waits for these alone
            raise ValueError(
                f"{where} has no graph, so it reaches no parameter. Compute it from the network's output without"
                " .detach(), .data or torch.no_grad(), or leave it out of the losses and log it instead:"
                f" self.log({name!r}, ...)."
            )


def _check_finite(losses: Losses) -> None:
    finite = torch.stack([loss.detach().isfinite().to(next(iter(losses.values())).device) for loss in losses.values()])
    if not bool(finite.all()):
        name, loss = next((n, v) for n, v in losses.items() if not bool(v.detach().isfinite()))
        raise NonFiniteError(
            f"losses[{name!r}] is {loss.detach().item()}. Nothing was changed. Look for a division by zero, a log of"
            " zero or a learning rate that is too high; torch.autograd.set_detect_anomaly(True) finds the operation."
        )
