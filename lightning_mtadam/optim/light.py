"""The one loss of a light step: in most steps, where the balance is not measured at every one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from lightning_mtadam.terms import Losses

SUM = "sum of the terms"  # what messages call it


def weighted_sum(losses: Losses, factors: Mapping[str, Tensor]) -> Losses:
    """The one loss of a light step: the sum of the losses, each multiplied by its factor."""
    with torch.enable_grad():
        parts = [loss * factors[name].to(loss.device) for name, loss in losses.items()]
        dtype = reduce(torch.promote_types, [part.dtype for part in parts])
        return {SUM: torch.stack([part.to(parts[0].device, dtype) for part in parts]).sum()}
