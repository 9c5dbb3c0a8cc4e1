"""Losses that are spoilt: in their value, or in their gradient alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def in_loss(loss: Tensor, factor: float) -> Tensor:
    return loss * factor


def in_gradient(loss: Tensor, factor: float) -> Tensor:
    """The value stays as it is."""
    loss = loss.clone()
    loss.register_hook(lambda gradient: gradient * factor)
    return loss


def spoilt(losses: Mapping[str, Tensor], term: str, factor: float = torch.nan) -> dict[str, Tensor]:
    """The losses, of which one is spoilt in its gradient."""
    return {**losses, term: in_gradient(losses[term], factor)}
