"""Losses as they are given, brought into the form that they are collected in."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat
from operator import is_

from torch import Tensor
from torch.optim import Optimizer

from lightning_mtadam.terms import Losses, steps_by_lbfgs


def as_losses(losses: Losses, optimizer: Optimizer, *, by: str = "") -> Losses:
    """Whatever mapping they are as a dict; zeros that require a gradient of their own as plain constants.

    ``x.new_tensor(0.0, requires_grad=True)`` reaches nothing, as ``torch.zeros(())``; but a parameter itself stays.
    Who makes a gradient of them that belongs to no value is named in ``by``: LBFGS is then refused.
    """
    if by and steps_by_lbfgs(optimizer):
        raise ValueError(
            f"{by} cannot be used with LBFGS, which compares values of one function: its gradient, which is made of the"
            " terms' gradients, is that of none. Use FixedWeights, GradNorm or UncertaintyWeighting with LBFGS, or"
            " another optimizer than LBFGS."
        )
    if not isinstance(losses, Mapping):
        return losses
    found = dict(losses.items())
    for name, loss in found.items():
        if isinstance(loss, Tensor) and loss.requires_grad and loss.grad_fn is None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            found[name] = loss if any(map(is_, parameters, repeat(loss))) else loss.detach()
    return found
