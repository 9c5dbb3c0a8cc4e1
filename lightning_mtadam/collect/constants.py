"""Constants on any device, which travel there once: the host would wait for every copy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def constant(values: Sequence[float] | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same tensor for the same values; never write to it.

    Example:
        >>> constant([1, 2], torch.float32, torch.device("cpu"))
        tensor([1., 2.])
    """
    return _made(values if isinstance(values, (int, float)) else tuple(values), dtype, device)


@lru_cache(maxsize=512)
def _made(values: tuple[float, ...] | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what an evaluation makes is used by the next step
        return torch.tensor(values, dtype=dtype, device=device)
