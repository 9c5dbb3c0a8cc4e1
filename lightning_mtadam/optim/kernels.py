"""The moments and the update of one block of parameters.

In a block every tensor is flat: parameters ``[b]``, per-term tensors ``[I, b]``; coefficients are ``[I, b]``, or
``[I, 1]`` where they are the same for all of it. ``V`` second moments are kept: I, or one with denominator "sum". The
arithmetic is fp32 or better; states are kept in the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.optim.options import Denominator


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of one parameter group that the update needs, and what holds for all groups.

    Attributes:
        lr: the group's, negative to maximize.
        beta1: the decay of the first moment.
        eps: what is added to the denominator.
        decay: what multiplies the parameters first: ``1 - lr * weight_decay``.
        denominator: which second moments divide the step.
        clip_value: the largest magnitude of an entry of the balanced gradient, if it is clipped so.
        finite: a boolean scalar; where it is false nothing may change. ``None``: it is known to be true.
    """

    lr: float
    beta1: float
    eps: float
    decay: float
    denominator: Denominator
    clip_value: float | None = None
    finite: Tensor | None = None

    def or_else(self, number: float, otherwise: float, like: Tensor) -> float | Tensor:
        """The number; the other where nothing may change, as a scalar of this dtype."""
        return number if self.finite is None else torch.where(self.finite, like.new_full((), number), otherwise)


@dataclass(frozen=True)
class Coefficients:
    """What differs from parameter to parameter, for one block.

    Attributes:
        scales: [I, 1] or [I, b], what multiplies each term's gradient.
        weights: likewise, of the square in the average of the squares, ``(1 - beta2) / (1 - beta2^t)``: the average
            has then its bias corrected. Zero where the term has not reached.
        factor: [1, 1] or [1, b], or [I, ...] with denominator "own": what multiplies the denominator, the first
            moment's bias correction over ``Moments.divisor``, times the number of reaching terms with update "mean".
        reaching: [1, 1] or [1, b], the number of terms that reach, at least 1; with denominator "mean" only.
        correction: as ``weights``, the second moments' bias correction, which amsgrad takes out again; only there.
    """

    scales: Tensor
    weights: Tensor
    factor: Tensor
    reaching: Tensor | None
    correction: Tensor | None


@dataclass(frozen=True)
class Moments:
    """A block's moments, updated in place.

    Attributes:
        exp_avg: [1, b], the average of the balanced gradient over ``divisor``; or [I, b] with denominator "own".
        exp_avg_sq: [V, b].
        max_exp_avg_sq: [V, b] with amsgrad.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None

    @property
    def divisor(self) -> int:
        """What the sum of the balanced gradients is divided by in the first moment: V, or 1 where each has its own."""
        return len(self.exp_avg_sq) // len(self.exp_avg)

    @cached_property
    def rows(self) -> tuple[tuple[Tensor, ...], ...]:
        """The rows of all three, [b] each."""
        every = (self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq)
        return tuple(() if moments is None else moments.unbind() for moments in every)


Update: TypeAlias = Callable[[Tensor, Tensor, Moments, Coefficients, Hyperparameters, Tensor], None]
"""``update``, or what does the same."""


def update(
    parameter: Tensor, gradients: Tensor, moments: Moments, local: Coefficients, hyper: Hyperparameters, scratch: Tensor
) -> None:
    """Update moments and parameters of a block in place.

    Args:
        parameter: [b].
        gradients: [I, b]; they are left as they are.
        moments: of the block.
        local: its coefficients.
        hyper: the numbers of its group.
        scratch: [I + 1, b], in the dtype of the arithmetic.
    """
    # g~_i <- scale_i g_i   (Alg. 1)
    balanced = torch.mul(gradients, local.scales, out=scratch[:-1])
    if hyper.finite is not None:
        balanced = torch.where(hyper.finite, balanced, 0)
    if hyper.clip_value is not None:
        balanced = clip_by_value(balanced, hyper.clip_value)
    step = balanced if hyper.denominator == "own" else _sum(balanced, scratch[-1:])
    if hyper.denominator == "sum":
        balanced = step
    # M <- beta1 M + (1 - beta1) / V sum_i g~_i   (Alg. 1, merged; per term with denominator "own")
    mean = step if moments.divisor == 1 else step / moments.divisor
    first = moments.exp_avg.to(balanced.dtype).lerp_(mean, hyper.or_else(1 - hyper.beta1, 0.0, mean))
    # v^_i <- v^_i + w (g~_i^2 - v^_i)   (Alg. 1, line 10, and the bias correction)
    second = moments.exp_avg_sq.to(balanced.dtype).lerp_(balanced.mul_(balanced), local.weights)
    _apply(parameter, first, second, moments, local, hyper, scratch)


def _sum(rows: Tensor, out: Tensor) -> Tensor:
    """The sum of the rows, [1, b]; row by row, which is quicker than a reduction of few rows."""
    first, *others = torch.split(rows, 1)
    if not others:
        return first
    torch.add(first, others[0], out=out)
    for row in others[1:]:
        out.add_(row)
    return out


def absorb(
    total: Tensor, gradient: Tensor, exp_avg_sq: Tensor | None, scale: Tensor, weight: Tensor, scratch: Tensor
) -> None:
    """Consume one term's gradient: add it, balanced, to the sum, and its square to the term's second moment.

    Args:
        total: [b], the sum over the terms.
        gradient: [b].
        exp_avg_sq: [b]; ``None`` where the terms have none.
        scale: [1], what multiplies the gradient.
        weight: [1], as of ``Coefficients``.
        scratch: [b], in the dtype of the arithmetic.
    """
    balanced = torch.mul(gradient, scale.to(scratch.dtype), out=scratch)
    total.add_(balanced)
    if exp_avg_sq is not None:
        second = exp_avg_sq.to(balanced.dtype).lerp_(balanced.mul_(balanced), weight.to(balanced.dtype))
        store(second, exp_avg_sq)


def finish(
    parameter: Tensor, total: Tensor, moments: Moments, local: Coefficients, hyper: Hyperparameters, missed: Tensor
) -> None:
    """The rest of ``update``, after ``absorb``.

    Args:
        parameter: [b].
        total: [b], the balanced gradient.
        moments: of the block.
        local: its coefficients.
        hyper: the numbers of its group.
        missed: [I, 1] bool: the terms that had no gradient here, of which the second moments shrink only.
    """
    wide = local.scales.dtype
    balanced = total.to(wide)
    first = moments.exp_avg.to(wide).lerp_(balanced[None] / moments.divisor, 1 - hyper.beta1)
    second = moments.exp_avg_sq.to(wide)
    if hyper.denominator == "sum":
        second.lerp_((balanced * balanced)[None], local.weights)
    else:
        second.mul_(torch.where(missed, 1 - local.weights, 1))
    _apply(parameter, first, second, moments, local, hyper, torch.empty_like(second))


def _apply(
    parameter: Tensor,
    first: Tensor,
    second: Tensor,
    moments: Moments,
    local: Coefficients,
    hyper: Hyperparameters,
    scratch: Tensor,
) -> None:
    """Keep the new moments, and move the parameters."""
    store(first, moments.exp_avg)
    store(second, moments.exp_avg_sq)
    if moments.max_exp_avg_sq is not None:
        assert local.correction is not None
        uncorrected = second * local.correction
        if hyper.finite is not None:  # what was kept in a narrow dtype may have been rounded up
            uncorrected = torch.where(hyper.finite, uncorrected, 0)
        largest = torch.maximum(moments.max_exp_avg_sq.to(second.dtype), uncorrected)
        store(largest, moments.max_exp_avg_sq)
        second = largest.div_(local.correction)
    moved = parameter.to(second.dtype)
    if hyper.decay != 1:
        moved.mul_(hyper.or_else(hyper.decay, 1.0, moved))  # decoupled, as in AdamW
    move(moved, first, denominators(second, local, hyper, scratch), hyper)
    if moved is not parameter:
        parameter.copy_(moved)


def store(value: Tensor, where: Tensor) -> None:
    """Write a moment back where it is kept; it may be there already.

    In a narrower dtype it saturates: an average that is infinite never decays, and minus itself is nan.
    """
    if value.dtype != where.dtype:
        largest = torch.finfo(where.dtype).max
        value = value.clamp(-largest, largest)
    if value is not where:
        where.copy_(value)


def denominators(second: Tensor, local: Coefficients, hyper: Hyperparameters, scratch: Tensor) -> Tensor:
    """``(sqrt(max_i v^_i) + eps)`` times the factor (Alg. 1): [V, b] -> [1, b], or [I, b] with denominator "own"."""
    if hyper.denominator == "own":
        root = torch.sqrt(second, out=scratch[: len(second)])
    elif hyper.denominator == "mean":
        assert local.reaching is not None
        root = torch.sum(second, 0, keepdim=True, out=scratch[:1]).div_(local.reaching).sqrt_()
    elif len(second) == 1:
        root = torch.sqrt(second, out=scratch[:1])
    elif len(second) == 2:  # twice as fast as a reduction
        root = torch.maximum(second[:1], second[1:], out=scratch[:1]).sqrt_()
    else:
        root = torch.amax(second, 0, keepdim=True, out=scratch[:1]).sqrt_()
    return root.add_(hyper.eps).mul_(local.factor)


def move(parameter: Tensor, first: Tensor, denominator: Tensor, hyper: Hyperparameters) -> None:
    """``theta <- theta - lr M^ / (sqrt(max_i v^_i) + eps)``, in place (Alg. 1)."""
    for moment, divisor in zip(first.unbind(), denominator.unbind(), strict=True):
        if hyper.eps == 0:
            parameter.sub_(torch.where(divisor > 0, moment / divisor, 0), alpha=hyper.lr)
        else:
            parameter.addcdiv_(moment, divisor, value=-hyper.lr)


def clip_by_value(balanced: Tensor, limit: float) -> Tensor:
    """Clamp the balanced gradient, the sum over the terms, to +-limit; all terms take the same factor. [I, b]."""
    total = balanced.sum(0)
    return balanced.mul_(torch.where(total.abs() > limit, limit / total.abs(), 1))


def balanced_norm(gradients: Tensor, scales: Tensor, scratch: Tensor) -> Tensor:
    """The L2 norm of a block's balanced gradient, the sum over the terms; a scalar."""
    norm: Tensor = torch.linalg.vector_norm(torch.mul(gradients, scales, out=scratch).sum(0))
    return norm
