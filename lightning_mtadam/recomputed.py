"""Keeps running statistics as the forward pass left them, where backward passes run parts of it again."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Kept: TypeAlias = dict[Tensor, Tensor]
"""Buffers, and what they held."""


def keep_statistics(kept: Kept, module: nn.Module, _: object) -> None:
    """Note what a normalising layer has counted, before a backward pass runs it again.

    A segment under ``torch.utils.checkpoint`` is run again in every backward pass, which is one for each term: without
    this, ten terms would make of a momentum of 0.1 one of 0.7. It is a hook before the forward pass of every module.

    Example:
        >>> from functools import partial
        >>> from torch.nn.modules.module import register_module_forward_pre_hook
        >>> from torch.utils.checkpoint import checkpoint
        >>> norm, x = nn.BatchNorm1d(1), torch.tensor([[0.0], [2.0]], requires_grad=True)
        >>> output, kept = checkpoint(norm, x, use_reentrant=False), {}
        >>> with register_module_forward_pre_hook(partial(keep_statistics, kept)):
        ...     output.sum().backward()
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0.1900]), tensor(2))
        >>> restore_statistics(kept)
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0.1000]), tensor(1))
    """
    if torch._C._current_graph_task_id() == -1:  # it is another thread's forward pass
        return
    for part in module.modules():  # of a compiled one no others are called
        for buffer in part.buffers(recurse=False) if isinstance(part, _NormBase) and part.training else ():
            if buffer not in kept:
                kept[buffer] = buffer.clone()


def restore_statistics(kept: Kept) -> None:
    """Put back what was noted."""
    for buffer, before in kept.items():
        buffer.data.copy_(before)  # data: a graph that is kept may have saved the buffer, but does not read it
