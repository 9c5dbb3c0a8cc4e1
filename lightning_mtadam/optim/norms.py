"""The L2 norms of the terms' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def norms_of(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The L2 norm of each, a scalar in fp32, or wider if any gradient is."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return []
    dtype = reduce(torch.promote_types, {gradient.dtype for gradient in present}, torch.float32)
    return list(torch._foreach_norm(present, 2.0, dtype=dtype))


def norm_table(
    gradients: Sequence[Sequence[Tensor | None]],
    known: Sequence[Sequence[Tensor | None] | None],
    dtype: torch.dtype,
    device: torch.device,
    *,
    uniform: bool,
) -> Tensor:
    """The norms of all gradients, zero where there is none: I lists of P -> [P, I].

    Args:
        gradients: of each term, one per parameter.
        known: of each term its norms, if they were taken already.
        dtype: of the table.
        device: of the table.
        uniform: whether all norms have that dtype and device already.
    """
    zero = torch.zeros((), dtype=dtype, device=device)
    every = list[Tensor]()
    for column, norms in zip(gradients, known, strict=True):
        if norms is None:
            found = iter(norms_of(column))
            norms = [None if gradient is None else next(found) for gradient in column]
        every += [zero if norm is None else norm for norm in norms]
    table = torch.stack(every if uniform else [norm.to(zero) for norm in every])
    return table.view(len(gradients), -1).T.contiguous()
