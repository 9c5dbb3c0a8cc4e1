"""The road of a batch, the same for MTAdam and the balancers: check, agree, differentiate, average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from operator import is_
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from lightning_mtadam.collect.differentiate import term_gradients
from lightning_mtadam.distributed.agreement import Parameters
from lightning_mtadam.distributed.averaging import Averaging, devices_of
from lightning_mtadam.distributed.joint_terms import Ranks, alike
from lightning_mtadam.distributed.processes import ALONE, Processes
from lightning_mtadam.recomputed import Kept, keep_statistics, restore_statistics
from lightning_mtadam.terms import HAS_GRAPH, Found, Losses, steps_by_lbfgs

_B = TypeVar("_B", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """The losses of one batch, and all that is needed to differentiate them."""

    losses: Losses  # of the terms that are present, in the order of the terms; on one of several processes also zeros
    parameters: list[Tensor]  # those of the optimizer
    model: nn.Module | None = None  # the network as it is called, wrapped or not
    grad_output: Tensor | None = None  # scalar by which every loss is multiplied
    loss_scale: Tensor | None = None  # of a gradient scaler
    processes: Processes = ALONE  # which train together
    terms: tuple[str, ...] = ()  # the names of all terms, in order
    collected: tuple[str, ...] = ()  # the names of these losses and of earlier ones that are held, on all processes
    averaging: Averaging | None = None  # what averages the gradients over the processes, if they do it now
    retain_graph: bool = False  # whether the graph is still needed afterwards

    @property
    def replicated(self) -> bool:
        """Whether several processes each hold the whole network."""
        return self.processes.group is not None and not self.processes.sharded

    def gradients(self) -> Found:
        """Differentiate each loss by itself."""
        network = None
        if self.processes.sharded and self.model is not None:
            from lightning_mtadam.distributed.fsdp import ShardedNetwork  # not imported above: it takes a second

            network = ShardedNetwork(self.model, self.parameters)
        factor, kept = self.grad_output, self.retain_graph
        return term_gradients(self.losses, self.parameters, grad_output=factor, network=network, retain_graph=kept)


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


def collect(
    batch: _B,
    check: Callable[[], Parameters],
    take: Callable[[_B], None],
    known: tuple[str, ...],
    pending: tuple[str, ...],
    ranks: Ranks,
) -> _B:
    """Check the losses, agree on them with the other processes, and hand them to who differentiates them.

    Args:
        batch: as it came; it is returned as it was taken.
        check: raises if anything is wrong with it on this process; gives the names and shapes of what is trained.
        take: differentiates the losses; the other processes are told of an error in it.
        known: the terms of earlier steps; empty before the first.
        pending: the terms of earlier batches of this step, if their gradients are held.
        ranks: what the processes know of each other.
    """
    group = batch.processes.group
    if group is None:
        check()
        taken = _ordered(batch, known, tuple(dict.fromkeys((*pending, *batch.losses))))
        hand_on(taken, take)
        return taken
    averaging = Averaging(group, devices_of(batch.parameters))
    try:
        mine = ranks.announce(batch.losses, check(), pending, batch.processes, batch.model)
        averaging.mine, names = mine, mine.terms
        if ranks.agree_before(mine):
            names = averaging.agree()
        taken = _ordered(batch, known, names, averaging.absent)
        losses = alike(taken.losses, batch.parameters[0])
        taken = replace(taken, losses=losses, averaging=averaging if batch.processes.averages else None)
        hand_on(taken, take)
    except Exception as error:
        averaging.fail(error)
        raise
    ranks.parameters = mine.parameters
    ranks.seen.update(taken.collected)
    return taken


def hand_on(batch: _B, take: Callable[[_B], None]) -> None:
    """Hand the losses on; what backward passes run again of the network does not count in its running statistics."""
    kept: Kept = {}
    try:
        with register_module_forward_pre_hook(partial(keep_statistics, kept)):
            take(batch)
    finally:
        if kept:
            restore_statistics(kept)


def _ordered(batch: _B, known: tuple[str, ...], names: tuple[str, ...], absent: Sequence[str] | None = None) -> _B:
    """The batch as it is taken: the losses that count, in the order of the terms; of one process those with a graph."""
    terms = known or names
    if absent is None and all(map(HAS_GRAPH, batch.losses.values())):
        absent = ()
    elif absent is None:
        absent = [name for name, loss in batch.losses.items() if not loss.requires_grad]
    present = {name: batch.losses[name] for name in terms if name in batch.losses and name not in absent}
    collected = tuple(name for name in names if name not in absent or name not in batch.losses) if absent else names
    return replace(batch, losses=present, terms=terms, collected=collected)
