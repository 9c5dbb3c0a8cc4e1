"""Moving averages of one gradient norm a term, at a layer or an output, as pure functions of I terms."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtadam.balancing import corrected_norms, update_norms
from lightning_mtadam.constants import constant

State = dict[str, Tensor]
"""Each [I]: the averages "norms", which begin at zero, and in how many steps, "counts", each has moved."""


def advance(before: State, observed: Tensor, decay: float) -> State:
    """The state after a step; the same if what was observed is not finite.

    Args:
        before: the state before it; empty before the first.
        observed: of each term in what part of the step it is present, and the sum over those parts of its norm. [2, I].
        decay: of the averages.
    """
    zeros = torch.zeros_like(observed[0])
    state = {key: before.get(key, zeros) for key in ("norms", "counts")}
    present = observed[0] > 0
    mean = observed[1] / torch.where(present, observed[0], 1)
    beta = constant(decay, mean.dtype, mean.device)
    norms, counts = update_norms(state["norms"], state["counts"], mean, present, beta, "unbiased")
    finite = observed.isfinite().all()
    after = {"norms": norms, "counts": counts}
    return {key: torch.where(finite, value, state[key]) for key, value in after.items()}


def averages(state: State, decay: float) -> Tensor:
    """The averages n_i, corrected for their start at zero, [I]; zero where there was no gradient yet.

    Example:
        >>> state = advance({}, torch.tensor([[1.0, 1.0, 0.0], [3.0, 0.0, 0.0]]), 0.9)
        >>> averages(state, 0.9)
        tensor([3., 0., 0.])
    """
    norms = state["norms"]
    return corrected_norms(norms, state["counts"], constant(decay, norms.dtype, norms.device), "unbiased")
