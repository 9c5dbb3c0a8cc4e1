"""How GradNorm moves its weights, as pure functions of I terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HEAD = 3  # of what is observed of a term the columns before its gradient: presence, loss, whether it reaches the layer

State = dict[str, Tensor]
"""Each [I]: "logits" z, the mean of "log_weights" over the steps, "initial_losses" L_i(0), in how many steps the term
was "seen", and whether it "reached" the shared layer in the last of them. "steps" is a scalar."""


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
        **dict.fromkeys(("logits", "log_weights", "seen", "reached"), zeros),
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
        lr: what a logit moves by in a step at the most.
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
    off = distances(state["logits"], norms, training_rates(losses, initial, ready), alpha, ready)
    logits = state["logits"] - lr * off.clamp(-1, 1)
    logits = logits + _mass(state["logits"], ready) - _mass(logits, ready)  # the weights of the others stay
    kept["logits"] = torch.where(ready, logits, state["logits"])
    finite = observed.isfinite().all()
    return {key: torch.where(finite, value, state[key]) for key, value in kept.items()}


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


def distances(logits: Tensor, norms: Tensor, rates: Tensor, alpha: float, present: Tensor) -> Tensor:
    """How far the logarithm of each weighted norm is from its target, as ratios are to one another.

    ``d_i = log(G_i / r_i^alpha) - mean_j log(G_j / r_j^alpha)``, with ``G_i = w_i ||grad_W L_i||`` and the mean over
    the terms that take part. All are zero where the ``G_i`` are to one another as the ``r_i^alpha``: wherever the
    paper's ``L_grad`` is zero, and also where it cannot be.

    Args:
        logits: z, [I].
        norms: ``||grad_W L_i||``, [I].
        rates: r_i, [I].
        alpha: the exponent.
        present: [I] bool; the others have no part in it, nor has a term without a gradient, or whose target is zero.

    Returns:
        [I]; zero where a term has no part in it.
    """
    targets = torch.special.xlogy(torch.full_like(rates, alpha), rates)
    taking = present & (norms > 0) & targets.isfinite()
    logs = torch.where(taking, weights_of(logits).log() + norms.log() - targets, 0)
    return torch.where(taking, logs - logs.sum() / taking.sum().clamp(min=1), 0)


def _mass(logits: Tensor, present: Tensor) -> Tensor:
    """The logarithm of the sum of what the softmax makes of the terms present, but for its common divisor."""
    return torch.logsumexp(logits.masked_fill(~present, -torch.inf), 0)
