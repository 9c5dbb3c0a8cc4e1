"""What MTAdam holds between ``backward`` and ``step``, for who looks at it."""

from __future__ import annotations

from torch import Tensor

from lightning_mtadam.optim.term_optimizer import TermOptimizer
from lightning_mtadam.terms import TermGradients


def held_by(optimizer: TermOptimizer) -> tuple[TermGradients, Tensor] | None:
    """The terms' gradients, [P] each, and what multiplies them, [P, I]; ``None`` if there are none, as in a light step.

    They are accumulated, averaged over the processes, without the loss scale, and not to be written to. With
    ``low_memory`` they are consumed already: there is none, but the scales.

    Example:
        >>> import torch
        >>> from lightning_mtadam import MTAdam
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = MTAdam([w])
        >>> optimizer.backward({"fit": w[0], "decay": w.square().sum()})
        >>> held_by(optimizer)[0]["decay"], held_by(optimizer)[1]
        ([tensor([6., 8.])], tensor([[1.0000, 0.1000]]))
    """
    pending = optimizer._pending
    if pending.shown is None or pending.light:
        return None
    updater = optimizer._updater()
    found = updater.tables.by_parameter((pending.absorbed or updater).scales_of(pending))
    scales = found.new_zeros(len(updater.tables.parameters), found.shape[1])
    scales[updater.tables.members] = found
    return dict(pending.gradients), scales


def consumes_at_once(optimizer: TermOptimizer) -> bool:
    """Whether it holds no gradient until ``step``: with ``low_memory``."""
    return optimizer._options.low_memory
