"""How long each term's second moment remembers: rules that choose one beta2 per layer and term.

Shapes: ``I`` terms, ``L`` layers. A rule takes the gradient norms n_i and the largest that each has had so far, both
[L, I], and returns beta2, [L, I].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from torch import Tensor

Memory: TypeAlias = Callable[[Tensor, Tensor], Tensor]

SHORTEST = 0.9  # no rule forgets sooner


def fixed(beta2: Sequence[float]) -> Memory:
    """One beta2 for each of the I terms, at every layer and step."""
    return lambda norms, largest: norms.new_tensor(beta2).expand_as(norms)


def fallen(beta2: float) -> Memory:
    r"""The smaller a term's gradient has become, the sooner it is forgotten.

    The memory :math:`1 / (1 - \beta_{2,i})` is that of ``beta2`` times :math:`n_i / \max n_i`, but some ten steps at
    least: a term whose gradient norm has fallen to a tenth remembers a tenth as long.

    Example:
        >>> import torch
        >>> fallen(0.999)(torch.tensor([[5.0, 0.5, 0.0]]), torch.tensor([[5.0, 5.0, 0.0]]))
        tensor([[0.9990, 0.9900, 0.9990]])
    """
    return partial(_fallen, beta2)


def _fallen(beta2: float, norms: Tensor, largest: Tensor) -> Tensor:
    share = (norms / largest).nan_to_num(nan=1.0)  # a term that has not reached the layer has not fallen
    return 1 - ((1 - beta2) / share).clamp(max=1 - SHORTEST)
