"""The L2 norms of the terms' gradients (Alg. 1, line 7), and whether they are finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mtadam.terms import Gradients


def wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of norms, scales and clocks: fp32, or wider if any tensor is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def norms_of(gradients: Gradients) -> list[Tensor | None]:
    """The L2 norm of each, a scalar in fp32, or wider if any gradient is; ``None`` where there is none."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return [None] * len(gradients)
    found = iter(torch._foreach_norm(present, 2.0, dtype=wide_dtype(present)))
    return [None if gradient is None else next(found) for gradient in gradients]


def norm_table(norms: Sequence[Gradients], like: Tensor, *, uniform: bool = False) -> Tensor:
    """The norms of all terms, zero where there is none: I lists of P -> [P, I], of the dtype and device of ``like``."""
    zero = like.new_zeros(())
    every = [zero if norm is None else norm for column in norms for norm in column]
    table = torch.stack(every if uniform else [norm.to(zero) for norm in every])
    return table.view(len(norms), -1).T.contiguous()
