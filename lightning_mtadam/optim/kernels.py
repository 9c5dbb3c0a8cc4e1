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

    def gather_gradients(self, block: Block, memory: Tensor) -> Tensor:
        """The block of all terms' gradients, copied to the beginning of ``memory``: [I, b]."""
        members = block.members(self.parameters)
        pieces = []
        for gradients in self.gradients:
            found = zip(block.members(gradients), members, strict=True)
            pieces += block.cut([p.new_zeros(()).expand_as(p) if g is None else g for g, p in found])
        rows = memory[: len(self.gradients) * sum(block.sizes)]
        return torch.cat(pieces, out=rows).view(len(self.gradients), -1)

    def memory_for(self, plan: Sequence[Block]) -> Tensor:
        """Memory for the largest block: fresh memory for every block would cost more than what is done with it."""
        largest = max(sum(block.sizes) for block in plan)
        return self.parameters[0].new_empty(len(self.gradients) * largest)


def update(bucket: Bucket, coefficients: Coefficients, hyper: Hyperparameters, clip_value: float | None = None) -> None:
    """Update moments and parameters of a bucket in place, block after block."""
    plan = list(plan_blocks(bucket.parameters))
    memory = bucket.memory_for(plan)
    for block in plan:
        local = coefficients.spread(block)
        # g~_i <- scale_i g_i   (Alg. 1)
        balanced = bucket.gather_gradients(block, memory).to(local.scales.dtype).mul_(local.scales)
        if clip_value is not None:
            balanced = clip_by_value(balanced, clip_value)
        first, second = _update_moments(bucket, block, balanced, hyper)
        parameter = block.gather(bucket.parameters)
        moved = move(parameter.to(balanced.dtype), first, second, local, hyper, scratch=balanced)
        block.scatter(_store(moved, parameter), bucket.parameters)


def _update_moments(bucket: Bucket, block: Block, balanced: Tensor, hyper: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Return the first moment, [b] or [I, b], and the second moments to divide by, [I, b]."""
    own = hyper.denominator == "own"
    exp_avg = block.gather_rows(bucket.exp_avg) if own else block.gather(bucket.exp_avg)
    exp_avg_sq = block.gather_rows(bucket.exp_avg_sq)
    wide = balanced.dtype
    # M <- beta1 M + (1 - beta1) sum_i g~_i   (Alg. 1, merged; per term with denominator "own")
    first = exp_avg.to(wide).mul_(hyper.beta1).add_(balanced if own else balanced.sum(0), alpha=1 - hyper.beta1)
    # v_i <- beta2 v_i + (1 - beta2) g~_i^2   (Alg. 1, line 10)
    second = exp_avg_sq.to(wide).mul_(hyper.beta2).addcmul_(balanced, balanced, value=1 - hyper.beta2)
    block.scatter(_store(first, exp_avg), bucket.exp_avg)
    block.scatter(_store(second, exp_avg_sq), bucket.exp_avg_sq)
    if bucket.max_exp_avg_sq:
        largest = block.gather_rows(bucket.max_exp_avg_sq)
        second = torch.maximum(largest.to(wide), second)
        block.scatter(largest.copy_(second), bucket.max_exp_avg_sq)
    return first, second


def _store(value: Tensor, where: Tensor) -> Tensor:
    """Write a value back to the narrower dtype it was kept in; it is there already if the dtypes are the same."""
    return where if value is where else where.copy_(value)


def move(
    parameter: Tensor, first: Tensor, second: Tensor, local: Coefficients, hyper: Hyperparameters, *, scratch: Tensor
) -> Tensor:
    """``theta <- theta - lr M^ / (sqrt(max_i v^_i) + eps)``, in place (Alg. 1); ``scratch`` is [I, b]."""
    corrected = torch.mul(second, local.second, out=scratch)
    if hyper.denominator == "max":
        denominator = corrected.amax(0).sqrt_()
    elif hyper.denominator == "mean":
        denominator = corrected.sum(0).div_(local.reaching.clamp(min=1)).sqrt_()
    else:
        denominator = corrected.sqrt_()
    direction = (first * local.first).div_(denominator.add_(hyper.eps))
    if hyper.eps == 0:
        direction = torch.where(denominator > 0, direction, 0)
    if hyper.denominator == "own":
        direction = direction.sum(0)
    if hyper.weight_decay:
        parameter.mul_(1 - hyper.lr * hyper.weight_decay)  # decoupled, as in AdamW
    return parameter.addcdiv_(direction, local.share, value=hyper.lr if hyper.maximize else -hyper.lr)


def clip_by_value(balanced: Tensor, limit: float) -> Tensor:
    """Clamp the balanced gradient, the sum over the terms, to +-limit; all terms take the same factor. [I, b]."""
    total = balanced.sum(0)
    factor = torch.where(total.abs() > limit, limit / total.abs(), 1)
    return balanced * factor


def balanced_norm(bucket: Bucket, scales: Tensor) -> Tensor:
    """The L2 norm of the balanced gradient over the bucket, a scalar. ``scales`` is [I, P]."""
    plan = list(plan_blocks(bucket.parameters))
    memory = bucket.memory_for(plan)
    parts: list[Tensor] = [
        torch.linalg.vector_norm((bucket.gather_gradients(block, memory) * block.expand(scales)).sum(0))
        for block in plan
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return norm
