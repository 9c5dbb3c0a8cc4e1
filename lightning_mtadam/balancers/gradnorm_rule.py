"""How GradNorm moves its weights, as pure functions of I terms."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPS = 1e-8


def weights_of(logits: Tensor) -> Tensor:
    """``I softmax(z)``: positive, and sums to I. [I] -> [I]."""
    return len(logits) * torch.softmax(logits, 0)


def training_rates(losses: Tensor, initial: Tensor, present: Tensor) -> Tensor:
    """The relative inverse training rates ``r_i``, whose mean over the terms present is one. [I] each.

    A loss below zero counts as zero.
    """
    ratios = torch.where(present, losses.clamp(min=0) / torch.where(present, initial, 1), 0)
    mean = ratios.sum() / present.sum().clamp(min=1)
    return ratios / torch.where(mean > 0, mean, 1)


def logit_gradient(logits: Tensor, norms: Tensor, rates: Tensor, alpha: float, present: Tensor) -> Tensor:
    """The gradient of ``L_grad`` by the logits, its targets being constant.

    ``dL_grad/dw_i = sign(G_i - mean(G) r_i^alpha) ||grad_W L_i||``, and through the softmax
    ``dL_grad/dz_i = w_i (dL_grad/dw_i - sum_j w_j dL_grad/dw_j / I)``.

    Args:
        logits: z, [I].
        norms: ``||grad_W L_i||``, [I].
        rates: r_i, [I].
        alpha: the exponent.
        present: [I] bool; the others have no part in it.

    Returns:
        [I].
    """
    weights = weights_of(logits)
    scaled = weights * norms
    mean = torch.where(present, scaled, 0).sum() / present.sum().clamp(min=1)
    slopes = torch.where(present, torch.sign(scaled - mean * rates**alpha) * norms, 0)
    return weights * (slopes - (weights * slopes).sum() / len(weights))


def adam_step(
    logits: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], steps: Tensor, lr: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One step of Adam, out of place; ``steps`` counts this one. The new logits and moments."""
    first = torch.lerp(moments[0], gradient, 1 - BETAS[0])
    second = torch.lerp(moments[1], gradient.square(), 1 - BETAS[1])
    corrected = second / (1 - BETAS[1] ** steps)
    step = first / (1 - BETAS[0] ** steps) / (corrected.sqrt() + EPS)
    return logits - lr * step, (first, second)
