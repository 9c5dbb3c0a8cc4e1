"""Brings the losses of all processes together before any of them is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from lightning_mtadam.distributed.agreement import Announcement, Parameters, agree, tell
from lightning_mtadam.distributed.processes import Processes
from lightning_mtadam.terms import Losses


def agree_on_terms(
    losses: Losses,
    check: Callable[[], Parameters],
    pending: Sequence[str],
    known: Sequence[str],
    processes: Processes,
    model: nn.Module | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Raise, on all processes, unless the losses are good on all of them.

    Args:
        losses: of this process.
        check: raises if anything is wrong with them here; gives the names and shapes of what is trained.
        pending: the terms of earlier batches of the same step.
        known: the terms of earlier steps; empty before the first.
        processes: which train together.
        model: the network as it is called.

    Returns:
        The names of these losses and of what is pending, in an order on which all ranks agree; those of them that
        have no graph on any rank, so that they count as absent.
    """
    group = processes.group
    assert group is not None
    try:
        parameters = check()
        names = tuple(dict.fromkeys((*pending, *losses)))
        constant = tuple(name for name, loss in losses.items() if not loss.requires_grad)
        modules = model.modules() if constant and model is not None else ()
        has_sync_batch_norm = any(isinstance(module, nn.SyncBatchNorm) for module in modules)
        mine = Announcement(names, constant, parameters, processes.averages, has_sync_batch_norm)
    except Exception as error:
        tell(error, group)
        raise
    terms, absent = agree(mine, group)
    unknown = [name for name in absent if name not in known]
    if unknown or len(absent) == len(terms):
        raise ValueError(
            f"losses[{(unknown or absent)[0]!r}] has no graph on any rank, so it reaches no parameter. Compute it"
            " from the network's output without .detach(), .data or torch.no_grad(), or leave it out of the losses"
            " and log it instead."
        )
    return terms, absent
