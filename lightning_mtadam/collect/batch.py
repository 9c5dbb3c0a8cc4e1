"""The road of a batch, the same for MTAdam and the balancers: check, agree, differentiate, average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mtadam.collect.differentiate import term_gradients
from lightning_mtadam.distributed.agreement import Parameters, tell
from lightning_mtadam.distributed.averaging import Averaging
from lightning_mtadam.distributed.joint_terms import agree_on_terms
from lightning_mtadam.distributed.processes import ALONE, Processes
from lightning_mtadam.terms import Found, Losses


@dataclass(frozen=True)
class Batch:
    """The losses of one batch, and all that is needed to differentiate them.

    Attributes:
        losses: of the terms that are present, in the order of the terms.
        parameters: those of the optimizer.
        model: the network as it is called, wrapped or not; ``None`` if it was not given.
        grad_output: scalar by which every loss is multiplied: the loss scale over the number of accumulated batches;
            ``None`` means 1.
        loss_scale: of a gradient scaler; ``None`` if there is none.
        processes: which train together.
        terms: the names of all terms, in order.
        collected: the names of these losses and of those of earlier batches that are held; all processes agree on them.
        begins: whether it is the first batch of a step; the others are accumulated to it.
        run: runs an ordinary backward pass from a scalar.
    """

    losses: Losses
    parameters: list[Tensor]
    model: nn.Module | None = None
    grad_output: Tensor | None = None
    loss_scale: Tensor | None = None
    processes: Processes = ALONE
    terms: tuple[str, ...] = ()
    collected: tuple[str, ...] = ()
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

    @property
    def replicated(self) -> bool:
        """Whether several processes each hold the whole network."""
        return self.processes.group is not None and not self.processes.sharded

    def run_weighted(self, weights: Sequence[float] | Tensor) -> Tensor:
        """One backward pass of the weighted sum of the losses; ``weights`` are of all terms, in order: [I].

        Returns:
            The weighted losses that are present, without their graph.
        """
        weighted = torch.stack([weights[self.terms.index(name)] * loss for name, loss in self.losses.items()])
        self.run(weighted.sum() * self.factor)
        return weighted.detach()

    def gradients(self) -> Found:
        """Differentiate each loss by itself."""
        if not self.processes.sharded:
            return term_gradients(self.losses, self.parameters, grad_output=self.grad_output)
        from lightning_mtadam.distributed.fsdp import ShardedNetwork  # not imported above: it takes a second

        network = ShardedNetwork(self.network, self.parameters)
        return term_gradients(self.losses, self.parameters, grad_output=self.grad_output, network=network)

    def averaging(self) -> Averaging | None:
        """What averages the gradients over the processes; ``None`` if they do not average now."""
        group = self.processes.group
        return Averaging(group) if group is not None and self.processes.averages else None


def collect(
    batch: Batch,
    check: Callable[[], Parameters],
    take: Callable[[Batch], None],
    *,
    known: tuple[str, ...],
    pending: tuple[str, ...],
) -> Batch:
    """Check the losses, agree on them with the other processes, and hand them to who differentiates them.

    Args:
        batch: as it came.
        check: raises if anything is wrong with it on this process; gives the names and shapes of what is trained.
        take: differentiates the losses that are present: by ``batch.gradients()``, or by one pass of ``batch.run``.
            An error in it is told to the other processes.
        known: the terms of earlier steps; empty before the first.
        pending: the terms of earlier batches of this step, if their gradients are held.

    Returns:
        The batch as it was taken.
    """
    group, absent = batch.processes.group, tuple[str, ...]()
    if group is None:
        check()
        names = tuple(dict.fromkeys((*pending, *batch.losses)))
    else:
        names, absent = agree_on_terms(
            batch.losses, check, pending=pending, known=known, processes=batch.processes, model=batch.model
        )
    terms = known or names
    present = {name: batch.losses[name] for name in terms if name in batch.losses and name not in absent}
    taken = replace(batch, losses=present, terms=terms, collected=names)
    try:
        take(taken)
    except Exception as error:
        if group is not None:
            tell(error, group)
        raise
    return taken
