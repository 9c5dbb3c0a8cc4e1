"""The update by torch's own fused Adam, one call for each term: on a CPU quicker than operation by operation.

What Adam's kernel does for the gradient of one term is nearly MTAdam's share of that term:

- its average of the squares, with the decay ``1 - w`` in place of beta2, is the term's ``v^_i`` (see ``Coefficients``);
- its amsgrad, over memory that begins at zero, keeps the largest of the averages of the terms so far;
- its first moment moves a part of the way to each gradient in turn, and parts can be chosen such that all gradients end
  with the same part of it;
- with a learning rate of zero it leaves the parameters where they are, until the last term has been seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_mtadam.optim.finite import is_host
from lightning_mtadam.optim.kernels import Coefficients, Hyperparameters, Moments
from lightning_mtadam.optim.options import Denominator

BLOCK = 1 << 18
"""Elements of a block: so large that calls cost little, so small that what all terms share stays in the cache."""

_LONG_AGO = torch.tensor(math.inf, device="cpu")
"""The number of steps so far, as Adam's kernel is told: it finds no bias to correct, which is done already."""


def suits(denominator: Denominator, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of this kind can be updated so: it takes numbers that are known on the host."""
    return denominator in ("max", "sum") and is_host(device) and dtype in (torch.float32, torch.float64)


def applies(gradients: Tensor, moments: Moments, hyper: Hyperparameters, *, packed: bool) -> bool:
    """Whether such a block can be updated so; not where coefficients differ from element to element.

    Args:
        gradients: [I, b], of which only dtype and device matter.
        moments: of the block.
        hyper: the numbers of its group.
        packed: whether coefficients differ from element to element.
    """
    return (
        suits(hyper.denominator, gradients.device, gradients.dtype)
        and not packed
        and moments.max_exp_avg_sq is None
        and hyper.clip_value is None
        and hyper.finite is None
        and hyper.eps >= torch.finfo(gradients.dtype).tiny  # or 0 / 0 would be a nan
    )


def update(
    parameter: Tensor, gradients: Tensor, moments: Moments, local: Coefficients, hyper: Hyperparameters, scratch: Tensor
) -> None:
    """As ``kernels.update``, but that gradients are consumed: they may be left multiplied by their scales."""
    squares = moments.exp_avg_sq.unbind()
    part = (1 - hyper.beta1) / len(squares)
    terms = [
        (gradient, divisor, square, weight)
        for (gradient, divisor), square, weight in zip(
            _balanced(gradients, local.scales[:, 0], hyper.denominator, scratch[1]),
            squares,
            local.weights[:, 0].tolist(),
            strict=True,
        )
        if weight > 0  # or neither the gradient nor the moment was ever anything but zero
    ]
    if len(terms) < len(squares):  # fewer parts are taken of M than beta1 leaves room for
        moments.exp_avg.mul_(hyper.beta1 / (1 - len(terms) * part))
    largest = [scratch[0].zero_()] if len(terms) > 1 else []
    lr, weight_decay = 0.0, 0.0
    for index, (gradient, divisor, square, weight) in enumerate(terms):
        to_come = len(terms) - 1 - index
        if to_come == 0:
            lr = hyper.lr / float(local.factor)
            weight_decay = (1 - hyper.decay) / lr if lr else 0.0
        torch._fused_adamw_(
            [parameter],
            [gradient],
            [moments.exp_avg[0]],
            [square],
            largest,
            [_LONG_AGO],
            lr=lr,
            beta1=1 - part / (1 - to_come * part),
            beta2=1 - weight,
            weight_decay=weight_decay,
            eps=hyper.eps,
            amsgrad=bool(largest),
            maximize=False,
            grad_scale=divisor,
        )
    if not terms:
        parameter.mul_(hyper.decay)


def _balanced(
    gradients: Tensor, scales: Tensor, denominator: Denominator, total: Tensor
) -> Iterable[tuple[Tensor, Tensor | None]]:
    """The balanced gradients, [b] each, with what the kernel is still to divide them by: it does so in fp32 only.

    Args:
        gradients: [I, b].
        scales: [I].
        denominator: with "sum" there is one gradient, that of the sum.
        total: [b], where the sum goes.
    """
    if denominator == "sum":
        torch.mul(gradients[0], scales[0], out=total)
        for gradient, scale in zip(gradients[1:], scales[1:], strict=True):
            total.addcmul_(gradient, scale)
        return [(total, None)]
    if scales.dtype != torch.float32:
        return [(gradient, None) for gradient in gradients.mul_(scales[:, None])]
    return zip(gradients, scales.reciprocal(), strict=True)
