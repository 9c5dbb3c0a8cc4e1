"""What ``backward`` has put into ``p.grad``, and what has become of it: edits count."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.balancing import norm_table, norms_of, wide_dtype
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.collect.pending import PendingGradients
from lightning_mtadam.distributed import sharding
from lightning_mtadam.edits.refusing import refuse, refuse_unreached
from lightning_mtadam.parameter_names import ParameterNames
from lightning_mtadam.terms import are_on_host

ClipAlgorithm: TypeAlias = Literal["norm", "value"]


class Spent:
    """The gradients that a step has used up: they are no part of the next one, unless they were changed since."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self._known = {
            id(one.grad): (weakref.ref(one.grad), one.grad._version) for one in parameters if one.grad is not None
        }

    def others(self, parameters: Sequence[Tensor]) -> dict[int, Tensor]:
        """What lies in ``p.grad`` beside them, by the parameter's index."""
        found = {at: one.grad for at, one in enumerate(parameters) if one.grad is not None}
        return {at: one for at, one in found.items() if not self._holds(one) and not _is_zero(one)} if found else found

    def _holds(self, gradient: Tensor) -> bool:
        reference, version = self._known.get(id(gradient), (None, 0))
        return reference is not None and reference() is gradient and gradient._version == version


class Shown:
    """One gradient of each parameter that is in ``p.grad``, for the step to take it back as it then is.

    Args:
        memory: holds them in one row. ``p.grad`` are views into it, each with a version counter of its own.
        parameters: those of the optimizer.
        touched: whether a parameter has a gradient.
        loss_scale: what they are multiplied by, for a gradient scaler to divide by it.
        watched: whether an edit must be found that leaves no trace, as through ``.data``.

    Attributes:
        held: what was put into ``p.grad``, by the parameter's index.
        edited: the indices of those that were changed by others.
        factor: by what :meth:`shorten` has multiplied all of them; ``None`` if it has not.
        clamped: whether :meth:`clamp` was called.
    """

    def __init__(
        self,
        memory: GradientMemory,
        parameters: Sequence[Tensor],
        touched: Sequence[bool],
        loss_scale: Tensor | None,
        *,
        watched: bool,
    ) -> None:
        self.memory, self.edited, self._loss_scale, self._watched = memory, set[int](), loss_scale, watched
        self.factor: Tensor | None = None
        self.held: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        if loss_scale is not None:
            self._multiply(loss_scale)
        for index, (parameter, flag, view) in enumerate(zip(parameters, touched, memory.views[0], strict=True)):
            parameter.grad = None
            if flag and view is not None:
                whole = sharding.like(view.data, parameter) if hasattr(parameter, "to_local") else view.data
                parameter.grad = self.held[index] = whole
                self._versions[index] = whole._version
        self._norms = self._norms_now() if watched or loss_scale is not None else {}  # with the loss scale
        self.clamped = False

    @property
    def changed(self) -> list[int]:
        """The indices of those that are not what they were, but for a factor that all have."""
        return list(self.held) if self.clamped else sorted(self.edited)

    def gradient(self, index: int) -> Tensor:
        """What lies in the memory for a parameter that was shown, in its shape, without the loss scale."""
        view = self.memory.views[0][index]
        assert view is not None
        return view if self._loss_scale is None else view / self._loss_scale.to(view)

    def add(self, parameters: Sequence[Tensor], others: Mapping[int, Tensor]) -> None:
        """Add gradients that were in ``p.grad`` before, by index: an edit. Where nothing is shown they come back."""
        for index, other in others.items():
            if index in self.held:
                self.edited.add(index)
                self.held[index].add_(other)
            else:
                parameters[index].grad = other

    def others(self, parameters: Sequence[Tensor]) -> dict[int, Tensor]:
        """What lies in the ``p.grad`` of parameters that were not shown, by their index."""
        return {at: one.grad for at, one in enumerate(parameters) if one.grad is not None and at not in self.held}

    def let_go(self, indices: Sequence[int]) -> None:
        """Forget some of them."""
        for index in indices:
            self.edited.discard(index)
            del self.held[index]

    def look(self, parameters: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        """The indices of those that are gone, set to ``None``, and of others that have come and are not zero."""
        gone, come = list[int](), list[int]()
        for index, parameter in enumerate(parameters):
            gradient = parameter.grad
            if gradient is None and index in self.held:
                gone.append(index)
            elif gradient is not None and index not in self.held and _is_something(gradient):
                come.append(index)
        return gone, come

    def take_back(self, parameters: Sequence[Tensor], *, scaled: bool) -> None:
        """Bring what is in ``p.grad`` to the memory, and find out what was ``edited``.

        ``scaled``: whether no gradient scaler can have divided yet; else the loss scale is taken out. A scaler divides
        without a trace, as who goes through ``.data``; the norms tell. An accelerator, which the host is not to wait
        for, is asked for the scale only.
        """
        self._bring(parameters)
        scale, left = self._loss_scale, None if scaled else self._scale()
        if scale is not None and left is not None:
            self._multiply(left.reciprocal())
            self._loss_scale, self._norms = None, {index: norm / scale.to(norm) for index, norm in self._norms.items()}
        if self._watched and are_on_host(self.memory.rows):
            kinds = [rows.dtype for rows in self.memory.rows]
            close = 8 * max(torch.finfo(dtype).eps for dtype in (torch.float32, *kinds))  # a scaler has rounded
            for index, norm in self._norms_now().items():
                if not torch.allclose(norm, self._norms[index], rtol=close, atol=0, equal_nan=True):
                    self.edited.add(index)

    def shorten(self, parameters: Sequence[Tensor], limit: float) -> None:
        """Multiply all by one factor, so that their L2 norm, without the loss scale, is at most the limit: no edit."""
        self._bring(parameters)
        found = {at: norm for at, norm in self._norms_now().items() if parameters[at].grad is not None}
        if not found:
            return
        shardings = [sharding.sharding_of(parameters[index]) for index in found]
        wide = self.memory.rows[0].new_empty(0, dtype=wide_dtype(self.memory.rows))
        norms = sharding.join_rows(norm_table([list(found.values())], wide), shardings)
        scale, norm = self._scale(), torch.linalg.vector_norm(norms)
        norm = norm if scale is None else norm / scale.to(norm)
        factor = (limit / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
        self._multiply(factor)
        self._norms = {index: norm * factor.to(norm) for index, norm in self._norms.items()}
        self.factor = factor if self.factor is None else self.factor * factor

    def clamp(self, parameters: Sequence[Tensor], limit: float) -> None:
        """Bring all entries, without the loss scale, to at most the limit in magnitude: no edit either."""
        self._bring(parameters)
        scale = self._scale()
        for rows in self.memory.rows:
            if scale is None:
                rows.clamp_(-limit, limit)
            else:
                rows.clamp_(-limit * scale.to(rows), limit * scale.to(rows))
        self.clamped = True
        if self._norms:  # with the loss scale, whether it is still in them or not
            again = 1 if scale is None or self._loss_scale is None else self._loss_scale / scale
            self._norms = {index: norm * again for index, norm in self._norms_now().items()}

    def _scale(self) -> Tensor | None:
        """The loss scale that is still in what was not edited, which may be one; if all was, a scaler has divided."""
        scale = self._loss_scale
        now = {} if scale is None else {at: norm for at, norm in self._norms_now().items() if at not in self.edited}
        if scale is None or not now:
            return None if scale is None else torch.ones_like(scale)
        found, whole = (torch.stack([norms[at].to(scale) for at in now]).sum() for norms in (now, self._norms))
        return torch.where((found - whole).abs() <= (found - whole / scale).abs(), scale, 1)

    def _bring(self, parameters: Sequence[Tensor]) -> None:
        """Note what was changed, and take what has replaced ours."""
        for index, held in self.held.items():
            gradient = parameters[index].grad
            if gradient is None or (gradient is held and held._version == self._versions[index]):
                continue
            self.edited.add(index)
            if gradient is not held:
                part = sharding.local_gradient(parameters[index])
                assert part is not None
                sharding.local(held).copy_(part)
                parameters[index].grad = held

    def _multiply(self, factor: Tensor) -> None:
        for rows in self.memory.rows:
            rows.mul_(factor.to(rows))

    def _norms_now(self) -> dict[int, Tensor]:
        found = norms_of([self.memory.views[0][index] for index in self.held])
        return {index: norm for index, norm in zip(self.held, found, strict=True) if norm is not None}


@dataclass
class ShownGradients(PendingGradients):
    """The gradients of the terms, and what is made of them in ``p.grad``."""

    fixed: bool = False  # whether a step looks at more than can still follow an edit
    spent: Spent = field(default_factory=Spent)  # what the last step has left in p.grad

    def clip(self, parameters: Sequence[Tensor], limit: float, algorithm: ClipAlgorithm) -> None:
        """Clip the balanced gradient; nothing where there is none. ``ValueError`` for an unknown way, or limit."""
        if algorithm not in ("norm", "value"):
            raise ValueError(f"algorithm must be 'norm' or 'value', but got {algorithm!r}.")
        if not limit > 0:
            raise ValueError(f"limit must be above 0, but got {limit!r}.")
        if self.shown is not None:
            (self.shown.shorten if algorithm == "norm" else self.shown.clamp)(parameters, float(limit))

    def meet_edits(self, parameters: Sequence[Tensor], names: ParameterNames, *, goes_on: bool) -> bool:
        """Take back what is in ``p.grad``, and say whether the terms' gradients have to follow.

        Args:
            parameters: those of the optimizer.
            names: theirs.
            goes_on: whether another batch comes to it, so that no gradient scaler has divided yet.

        Raises:
            RuntimeError: for an edit that cannot count.
        """
        shown: Shown = self.shown
        gone, come = shown.look(parameters)
        if len(gone) == len(shown.held):
            self.drop_gradients()
            return False
        if self.absorbed is not None and goes_on:
            return False  # what comes is refused
        held = dict(shown.held)
        if gone:
            shown.let_go(gone)
        shown.take_back(parameters, scaled=goes_on)
        changed = shown.edited.union(gone) if self.absorbed is not None else shown.edited
        if (changed and self.fixed) or (come and not goes_on):
            shown.held = held  # as it was
        if changed and self.fixed:
            refuse([names.labels[index] for index in sorted(changed)], self.absorbed is not None)
        if come and not goes_on:
            refuse_unreached([names.labels[index] for index in come])
        if gone:
            (self if self.absorbed is None else self.absorbed).drop(gone)
        return self.absorbed is None and (shown.clamped or bool(shown.edited) or (goes_on and shown.factor is not None))

    def drop(self, indices: Sequence[int]) -> None:
        """Forget the gradients of some parameters; all, if no other has any."""
        for index in indices:
            for gradients in self.gradients.values():
                gradient, gradients[index] = gradients[index], None
                if gradient is not None:
                    gradient.zero_()  # what comes is added to it
            for norms in self.norms.values():
                norms[index] = None
        if indices and not any(self.touched):
            self.drop_gradients()


def _is_zero(gradient: Tensor) -> bool:
    """Whether it is; of an accelerator, which the host is not to wait for, that is not known."""
    return are_on_host([gradient]) and not bool(gradient.any())


def _is_something(gradient: Tensor) -> bool:
    """Whether it is known not to be zero."""
    return are_on_host([gradient]) and bool(gradient.any())


def run_hooks(parameters: Sequence[Tensor]) -> None:
    """Call the hooks of ``register_post_accumulate_grad_hook``, now that the gradients are there."""
    for parameter in parameters:
        if parameter.grad is not None:
            for hook in tuple((parameter._post_accumulate_grad_hooks or {}).values()):
                hook(parameter)
