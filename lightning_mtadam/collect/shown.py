"""What ``backward`` has put into ``p.grad``, and what has become of it: edits count."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.collect.norms import are_on_host, is_host, norm_table, norms_of, wide_dtype
from lightning_mtadam.distributed import sharding

ClipAlgorithm: TypeAlias = Literal["norm", "value"]


class Spent:
    """The gradients that a step has used up: they are no part of the next one, unless they were changed since."""

    def __init__(self, parameters: Sequence[Tensor] = ()) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._known = {id(gradient): (weakref.ref(gradient), gradient._version) for gradient in gradients}

    def others(self, parameters: Sequence[Tensor]) -> dict[int, Tensor]:
        """What lies in ``p.grad`` beside them, by the parameter's index."""
        found = {index: parameter.grad for index, parameter in enumerate(parameters) if parameter.grad is not None}
        return {index: gradient for index, gradient in found.items() if not self._holds(gradient)}

    def _holds(self, gradient: Tensor) -> bool:
        reference, version = self._known.get(id(gradient), (None, 0))
        return reference is not None and reference() is gradient and gradient._version == version


class Shown:
    """One gradient of each parameter that is in ``p.grad``, for the step to take it back as it then is.

    Args:
        memory: holds them in one row. ``p.grad`` are views into it, each with a version counter of its own.
        parameters: those of the optimizer.
        touched: whether a parameter has a gradient.
        loss_scale: what a gradient scaler is to divide them by, and they are multiplied by already.
        watched: whether an edit must be found that leaves no trace, as through ``.data``.

    Attributes:
        edited: the indices of those that were changed by others.
        factor: by what :meth:`shorten` has multiplied all of them; ``None`` if it has not.
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
        self._held: dict[int, Tensor] = {}
        for index, (parameter, flag, view) in enumerate(zip(parameters, touched, memory.views[0], strict=True)):
            parameter.grad = None
            if flag and view is not None:
                parameter.grad = self._held[index] = sharding.like(view.data, parameter)
        self._versions = {index: held._version for index, held in self._held.items()}
        self._norms = self._norms_now() if watched or loss_scale is not None else {}  # with the loss scale
        self._clamped = False

    def __len__(self) -> int:
        return len(self._held)

    @property
    def changed(self) -> list[int]:
        """The indices of those that are not what they were, but for a factor that all have."""
        return list(self._held) if self._clamped else sorted(self.edited)

    def add(self, parameters: Sequence[Tensor], others: Mapping[int, Tensor]) -> None:
        """Add gradients that were in ``p.grad`` before, by index: an edit. Where nothing is shown they come back."""
        for index, other in others.items():
            if index in self._held:
                self.edited.add(index)
                self._held[index].add_(other)
            else:
                parameters[index].grad = other

    def missing(self, parameters: Sequence[Tensor]) -> list[int]:
        """The indices of those that are gone: set to ``None``, as ``model.zero_grad()`` does."""
        return [index for index in self._held if parameters[index].grad is None]

    def beside(self, parameters: Sequence[Tensor]) -> list[int]:
        """The indices of other parameters that have a gradient now; on the host, one that is not zero."""
        found = [(index, one.grad) for index, one in enumerate(parameters) if index not in self._held]
        return [at for at, one in found if one is not None and (not is_host(one.device) or bool(one.any()))]

    def let_go(self, indices: Sequence[int]) -> None:
        """Forget some of them."""
        for index in indices:
            self.edited.discard(index)
            del self._held[index]

    def take_back(self, parameters: Sequence[Tensor], *, scaled: bool) -> None:
        """Bring what is in ``p.grad`` to the memory, without the loss scale, and find out what was ``edited``.

        ``scaled``: whether no gradient scaler can have divided yet. It does so without a trace, as who goes through
        ``.data``; the norms tell. An accelerator, which the host is not to wait for, is asked for the scale only.
        """
        self._bring(parameters)
        scale, self._loss_scale = self._loss_scale, self._loss_scale if scaled else self._scale()
        if scale is not None and self._loss_scale is not None:
            self._multiply(self._loss_scale.reciprocal())
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
        shardings = [sharding.sharding_of(parameters[index]) for index in self._held]
        wide = self.memory.rows[0].new_empty(0, dtype=wide_dtype(self.memory.rows))
        norms = sharding.join_rows(norm_table([list(self._norms_now().values())], wide), shardings)
        scale = self._scale()
        norm = torch.linalg.vector_norm(norms) / (1 if scale is None else scale.to(norms))
        factor = (limit / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
        self._multiply(factor)
        self._norms = {index: norm * factor.to(norm) for index, norm in self._norms.items()}
        self.factor = factor if self.factor is None else self.factor * factor

    def clamp(self, parameters: Sequence[Tensor], limit: float) -> None:
        """Bring all entries, without the loss scale, to at most the limit in magnitude: no edit either."""
        self._bring(parameters)
        scale = self._scale()
        for rows in self.memory.rows:
            most = rows.new_full((), limit) if scale is None else scale.to(rows) * limit
            rows.clamp_(-most, most)
        self._clamped, self._norms = True, self._norms_now() if self._norms else {}

    def _scale(self) -> Tensor | None:
        """The loss scale that is still in what was not edited, which may be one; if all was, a scaler has divided."""
        scale, now = self._loss_scale, {at: norm for at, norm in self._norms_now().items() if at not in self.edited}
        if scale is None or not now:
            return None if scale is None else torch.ones_like(scale)
        found, whole = (torch.stack([norms[at].to(scale) for at in now]).sum() for norms in (now, self._norms))
        return torch.where((found - whole).abs() <= (found - whole / scale).abs(), scale, 1)

    def _bring(self, parameters: Sequence[Tensor]) -> None:
        """Note what was changed, and take what has replaced ours."""
        for index, held in self._held.items():
            parameter, part = parameters[index], sharding.local_gradient(parameters[index])
            if part is not None and parameter.grad is not held:
                sharding.local(held).copy_(part)
                parameter.grad = held
                self.edited.add(index)
            elif held._version != self._versions[index]:
                self.edited.add(index)

    def _multiply(self, factor: Tensor) -> None:
        for rows in self.memory.rows:
            rows.mul_(factor.to(rows))

    def _norms_now(self) -> dict[int, Tensor]:
        found = norms_of([self.memory.views[0][index] for index in self._held])
        return {index: norm for index, norm in zip(self._held, found, strict=True) if norm is not None}


def run_hooks(parameters: Sequence[Tensor]) -> None:
    """Call the hooks of ``register_post_accumulate_grad_hook``, now that the gradients are there."""
    for parameter in parameters:
        if parameter.grad is not None:
            for hook in tuple((parameter._post_accumulate_grad_hooks or {}).values()):
                hook(parameter)
