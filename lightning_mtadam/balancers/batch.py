"""A batch as a balancer gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mtadam import collect
from lightning_mtadam.distributed.averaging import mean_over


@dataclass(frozen=True)
class Batch(collect.Batch):
    """The losses of one batch, and all that is needed to make one gradient of them.

    Attributes:
        losses: scalars by term, with their graphs: of the terms that are present, in the order of the terms; checked,
            and agreed on by all processes. One without a graph is a constant on this process.
        parameters: the tensors that the optimizer steps on.
        collected: the names of these losses and of earlier ones whose gradients are held, on all processes.
        averaging: what averages gradients over the processes, if they do it in this batch.
        model: the network as it is called, wrapped or not.
        grad_output: scalar by which every loss is multiplied, ``None`` for 1; ``factor`` is always a tensor.
        loss_scale: scalar, the part of ``grad_output`` that is a gradient scaler's; ``None`` if there is none.
        processes: the processes that train together.
        terms: the names of all I terms, in order; those of absent terms too.
        retain_graph: whether the graph is still needed afterwards; ``run`` keeps it then.
        begins: whether it is the first batch of a step; the others are accumulated to it.
        run: runs an ordinary backward pass from a scalar, as ``torch.autograd.backward`` does. Call it once a batch:
            what wraps the network counts on it.

    Example:
        >>> w = nn.Parameter(torch.tensor(2.0))
        >>> model = nn.ParameterList([w])
        >>> batch = Batch({"fit": w**2, "decay": w}, [w], model, torch.tensor(0.5), terms=("fit", "late", "decay"))
        >>> batch.share
        tensor(0.5000)
        >>> batch.run_weighted([1.0, 7.0, 10.0])
        tensor([ 4., 20.])
        >>> w.grad  # half of 1 * 4 + 10 * 1
        tensor(7.)
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
        """The part of the step's losses that is this batch's, a scalar: one over the number of accumulated batches."""
        return self.factor if self.loss_scale is None else self.factor / self.loss_scale

    def mean_over_processes(self, tensor: Tensor) -> Tensor:
        """The mean of ``tensor``, of any shape, over the processes; the tensor itself where this batch is not averaged.

        Under accumulation processes average in the last batch of a step only: give it the sum over the batches so far.
        """
        if self.processes.group is None or not self.processes.averages:
            return tensor
        return mean_over(tensor, self.processes.group)

    def mean_of_all(self, tensor: Tensor) -> Tensor:
        """The mean of ``tensor``, of any shape, over the processes in every batch: for what all weigh the terms by."""
        return tensor if self.processes.group is None else mean_over(tensor, self.processes.group)

    def run_weighted(self, weights: Sequence[float] | Tensor) -> Tensor:
        """One backward pass of the weighted sum of the losses, which leaves its gradient in ``p.grad``.

        Args:
            weights: of all terms, in order, also of those that are absent: [I].

        Returns:
            The weighted losses of the terms that are present, without their graph.
        """
        weighted = torch.stack([weights[self.terms.index(name)] * loss for name, loss in self.losses.items()])
        self.run(weighted.sum() * self.factor)
        return weighted.detach()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or fp32 if it is narrower."""
    return torch.promote_types(dtype, torch.float32)
