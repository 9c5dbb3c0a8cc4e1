"""The moments and the update of one block, and the loop over the blocks.

In a block every tensor is flat: parameters ``[b]``, per-term tensors ``[I, b]``; coefficients are spread to ``[I, b]``
or ``[I, 1]``. The arithmetic is fp32 or better; states are kept in the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mtadam.optim.blocks import Block, plan_blocks
from lightning_mtadam.optim.options import Denominator


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of one parameter group that the update needs."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    denominator: Denominator


@dataclass(frozen=True)
class Coefficients:
    """What differs from parameter to parameter.

    Attributes:
        scales: [I, P], what multiplies each term's gradient.
        first: [P], or [I, P] with denominator "own": one over the first moment's bias correction.
        second: [I, P], one over the second moment's bias correction; zero where the term has not reached.
        share: [P], by what the step is divided ("mean": the number of terms that reach the parameter).
        reaching: [P], that number.
    """

    scales: Tensor
    first: Tensor
    second: Tensor
    share: Tensor
    reaching: Tensor

    def spread(self, block: Block) -> Coefficients:
        """The coefficients of a block, spread over its elements."""
        return Coefficients(
            block.expand(self.scales),
            block.expand(self.first),
            block.expand(self.second),
            block.expand(self.share),
            block.expand(self.reaching),
        )


@dataclass(frozen=True)
class Bucket:
    """The tensors of parameters that share a group, a device and a dtype.

    Attributes:
        parameters: P tensors.
        gradients: I lists of P gradients; ``None`` where the term does not reach the parameter.
        exp_avg: P tensors, each of its parameter's shape, or with denominator "own" a leading dimension of I.
        exp_avg_sq: P tensors of shape [I, *parameter.shape].
        max_exp_avg_sq: as ``exp_avg_sq``; empty without amsgrad.
    """

    parameters: Sequence[Tensor]
    gradients: Sequence[Sequence[Tensor | None]]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    max_exp_avg_sq: Sequence[Tensor]

    def gather_gradients(self, block: Block) -> Tensor:
        """The block of all terms' gradients, a copy: [I, b]."""
        pieces = []
        for gradients in self.gradients:
            pieces += block.pieces(
                [
                    parameter.new_zeros(()).expand_as(parameter) if gradient is None else gradient
                    for gradient, parameter in zip(gradients, self.parameters, strict=True)
                ]
            )
        return torch.cat(pieces).view(len(self.gradients), -1)


def update(bucket: Bucket, coefficients: Coefficients, hyper: Hyperparameters, clip_value: float | None = None) -> None:
    """Update moments and parameters of a bucket in place, block after block."""
    for block in plan_blocks(bucket.parameters):
        local = coefficients.spread(block)
        balanced = bucket.gather_gradients(block) * local.scales
        if clip_value is not None:
            balanced = clip_by_value(balanced, clip_value)
        first, second = _update_moments(bucket, block, balanced, hyper)
        parameter = block.gather(bucket.parameters)
        moved = step_block(parameter.to(balanced.dtype), first, second, local, hyper)
        parameter.copy_(moved)
        block.scatter(parameter, bucket.parameters)


def _update_moments(bucket: Bucket, block: Block, balanced: Tensor, hyper: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Return the first moment, [b] or [I, b], and the second moments to divide by, [I, b]."""
    own = hyper.denominator == "own"
    exp_avg = block.gather_rows(bucket.exp_avg) if own else block.gather(bucket.exp_avg)
    exp_avg_sq = block.gather_rows(bucket.exp_avg_sq)
    # M <- beta1 M + (1 - beta1) sum_i g~_i   (Alg. 1, line 9, merged; line 9 itself with denominator "own")
    _average(exp_avg, balanced if own else balanced.sum(0), hyper.beta1)
    # v_i <- beta2 v_i + (1 - beta2) g~_i^2   (Alg. 1, line 10)
    _average(exp_avg_sq, balanced.square(), hyper.beta2)
    block.scatter(exp_avg, bucket.exp_avg)
    block.scatter(exp_avg_sq, bucket.exp_avg_sq)
    if bucket.max_exp_avg_sq:
        largest = block.gather_rows(bucket.max_exp_avg_sq)
        torch.maximum(largest, exp_avg_sq, out=largest)
        block.scatter(largest, bucket.max_exp_avg_sq)
        exp_avg_sq = largest
    return exp_avg.to(balanced.dtype), exp_avg_sq.to(balanced.dtype)


def _average(average: Tensor, value: Tensor, beta: float) -> None:
    """``average <- beta average + (1 - beta) value``, in place, in the wider of the two dtypes."""
    if average.dtype == value.dtype:
        average.mul_(beta).add_(value, alpha=1 - beta)
    else:
        average.copy_(average.to(value.dtype).mul_(beta).add_(value, alpha=1 - beta))


def step_block(parameter: Tensor, first: Tensor, second: Tensor, local: Coefficients, hyper: Hyperparameters) -> Tensor:
    """The parameter after ``theta <- theta - lr M^ / (sqrt(max_i v^_i) + eps)`` (Alg. 1, lines 11-14). [b]."""
    corrected = second * local.second
    if hyper.denominator == "max":
        denominator = corrected.amax(0).sqrt_()
    elif hyper.denominator == "mean":
        denominator = (corrected.sum(0) / local.reaching.clamp(min=1)).sqrt_()
    else:
        denominator = corrected.sqrt_()
    direction = first * local.first / denominator.add_(hyper.eps)
    if hyper.eps == 0:
        direction = torch.where(denominator > 0, direction, 0)
    if hyper.denominator == "own":
        direction = direction.sum(0)
    if hyper.weight_decay:
        parameter = parameter * (1 - hyper.lr * hyper.weight_decay)  # decoupled, as in AdamW
    step = hyper.lr if hyper.maximize else -hyper.lr
    return parameter.add(direction / local.share, alpha=step)


def clip_by_value(balanced: Tensor, limit: float) -> Tensor:
    """Clamp the balanced gradient, the sum over the terms, to +-limit; all terms take the same factor. [I, b]."""
    total = balanced.sum(0)
    factor = torch.where(total.abs() > limit, limit / total.abs(), 1)
    return balanced * factor


def balanced_norm(bucket: Bucket, scales: Tensor) -> Tensor:
    """The L2 norm of the balanced gradient over the bucket, a scalar. ``scales`` is [I, P]."""
    parts: list[Tensor] = [
        torch.linalg.vector_norm((bucket.gather_gradients(block) * block.expand(scales)).sum(0))
        for block in plan_blocks(bucket.parameters)
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return norm
