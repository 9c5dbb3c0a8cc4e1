"""How GradNorm moves its weights, as pure functions of I terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPS = 1e-8
HEAD = 3  # of what is observed of a term the columns before its gradient: presence, loss, whether it reaches the layer

State = dict[str, Tensor]
"""Each [I]: "logits" z, how many "moves" each has made, its moments "exp_avg" and "exp_avg_sq", the mean of
"log_weights" over the steps, "initial_losses" L_i(0), in how many steps the term was "seen", and whether it "reached"
the shared layer in the last of them. "steps" is a scalar."""


def beginning(terms: int, initial: Sequence[float] | None, dtype: torch.dtype, device: torch.device) -> State:
    """The state before the first step.

    Args:
        terms: I.
        initial: L_i(0) by term, if they are given.
        dtype: of all tensors.
        device: of all tensors.
    """
    zeros = torch.zeros(terms, dtype=dtype, device=device)
    return {
        **dict.fromkeys(("logits", "moves", "exp_avg", "exp_avg_sq", "log_weights", "seen", "reached"), zeros),
        "steps": zeros.sum(),
        "initial_losses": torch.tensor(initial, dtype=dtype, device=device) if initial is not None else zeros,
    }


def advance(state: State, observed: Tensor, *, alpha: float, lr: float, start_length: int) -> State:
    """The state after a step; the same if what was observed is not finite.

    Args:
        state: before it.
        observed: of each term in what part of the step it is present, the sum over those parts of its loss, whether it
            reaches the shared layer (all zero if not), and its gradient there. [I, HEAD + |W|].
        alpha: the exponent of the training rates.
        lr: learning rate of the logits.
        start_length: over how many steps the initial losses are averaged, 0 if they are given; a term counts from the
            last of them on.
    """
    present = observed[:, 0] > 0
    losses = observed[:, 1] / torch.where(present, observed[:, 0], 1)
    norms = torch.linalg.vector_norm(observed[:, HEAD:], dim=1)
    seen = state["seen"] + present
    mean = torch.lerp(state["initial_losses"], losses, 1 / seen.clamp(min=1))
    initial = torch.where(present & (seen <= start_length), mean, state["initial_losses"])
    steps = state["steps"] + 1
    kept = {
        "initial_losses": initial,
        "seen": seen,
        "reached": torch.where(present, (observed[:, 2] > 0).to(losses), state["reached"]),
        "steps": steps,
        "log_weights": torch.lerp(state["log_weights"], weights_of(state["logits"]).log(), 1 / steps),
    }
    ready = present & (seen >= start_length) & (initial > 0)
    gradient = logit_gradient(state["logits"], norms, training_rates(losses, initial, ready), alpha, ready)
    moves = state["moves"] + 1
    logits, moments = adam_step(state["logits"], gradient, (state["exp_avg"], state["exp_avg_sq"]), moves, lr)
    logits = logits + _mass(state["logits"], ready) - _mass(logits, ready)  # the weights of the others stay
    learned = {"logits": logits, "exp_avg": moments[0], "exp_avg_sq": moments[1], "moves": moves}
    learned = {key: torch.where(ready, value, state[key]) for key, value in learned.items()}
    finite = observed.isfinite().all()
    return {key: torch.where(finite, value, state[key]) for key, value in {**kept, **learned}.items()}


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

    ``dL_grad/dw_i = sign(G_i - mean(G) r_i^alpha) ||grad_W L_i||``, and through the softmax, with sums over the terms
    present, ``dL_grad/dz_i = w_i (dL_grad/dw_i - sum_j w_j dL_grad/dw_j / sum_j w_j)``.

    Args:
        logits: z, [I].
        norms: ``||grad_W L_i||``, [I].
        rates: r_i, [I].
        alpha: the exponent.
        present: [I] bool; the others have no part in it, and the sum of the weights of these stays.

    Returns:
        [I]; zero where not present.
    """
    weights = torch.where(present, weights_of(logits), 0)
    scaled = weights * norms
    mean = scaled.sum() / present.sum().clamp(min=1)
    slopes = torch.where(present, torch.sign(scaled - mean * rates**alpha) * norms, 0)
    total = torch.where(present.any(), weights.sum(), 1)
    return weights * (slopes - (weights * slopes).sum() / total)


def _mass(logits: Tensor, present: Tensor) -> Tensor:
    """The logarithm of the sum of what the softmax makes of the terms present, but for its common divisor."""
    return torch.logsumexp(logits.masked_fill(~present, -torch.inf), 0)


def adam_step(
    logits: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], steps: Tensor, lr: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One step of Adam, out of place; ``steps`` counts this one. The new logits and moments."""
    first = torch.lerp(moments[0], gradient, 1 - BETAS[0])
    second = torch.lerp(moments[1], gradient.square(), 1 - BETAS[1])
    corrected = second / (1 - BETAS[1] ** steps)
    step = first / (1 - BETAS[0] ** steps) / (corrected.sqrt() + EPS)
    return logits - lr * step, (first, second)
