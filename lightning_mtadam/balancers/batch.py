"""A batch as a balancer gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mtadam import collect


@dataclass(frozen=True)
class Batch(collect.Batch):
    """The losses of one batch, and all that is needed to make one gradient of them.

    Attributes:
        losses: of the terms that are present, in the order of the terms; checked, and agreed on by all processes.
        parameters: those of the optimizer.
        model: the network as it is called, wrapped or not.
        grad_output: scalar by which every loss is multiplied, ``None`` for 1; ``factor`` is always a tensor.
        loss_scale: of a gradient scaler; ``None`` if there is none.
        processes: which train together.
        terms: the names of all terms, in order.
        begins: whether it is the first batch of a step; the others are accumulated to it.
        run: runs an ordinary backward pass from a scalar.
    """

    begins: bool = True
    run: Callable[[Tensor], None] = torch.autograd.backward

    @cached_property
    def network(self) -> nn.Module:
        """The network without ``DistributedDataParallel``."""
        assert self.model is not None
        module: nn.Module = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        return module

    @cached_property
    def factor(self) -> Tensor:
        """By what every loss is to be multiplied, a scalar."""
        one = torch.ones_like(next(iter(self.losses.values())))
        return (one if self.grad_output is None else self.grad_output).detach()

    @property
    def share(self) -> Tensor:
        """The part of the step's losses that is this batch's: one over the number of accumulated batches."""
        return self.factor if self.loss_scale is None else self.factor / self.loss_scale

    def run_weighted(self, weights: Sequence[float] | Tensor) -> Tensor:
        """One backward pass of the weighted sum of the losses, which leaves its gradient in ``p.grad``.

        Args:
            weights: of all terms, in order: [I].

        Returns:
            The weighted losses that are present, without their graph.
        """
        weighted = torch.stack([weights[self.terms.index(name)] * loss for name, loss in self.losses.items()])
        self.run(weighted.sum() * self.factor)
        return weighted.detach()
