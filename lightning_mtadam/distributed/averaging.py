"""Averages the terms' gradients over the processes of a group, each while the next term's are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mtadam.distributed.agreement import reached_anywhere
from lightning_mtadam.terms import TermGradients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

    from lightning_mtadam.distributed.processes import Processes
    from lightning_mtadam.optim.layout import TermMemory


class Averaging:
    """Sends each term's gradients off as soon as they are there, and receives their averages.

    A parameter that a term reaches on some ranks only has a gradient on all of them: on the others it counts as zero.

    Args:
        group: the processes.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._sent: dict[str, tuple[TermMemory, int, list[bool], list[Work]]] = {}

    def send(self, name: str, gradients: Sequence[Tensor | None], memory: TermMemory, row: int) -> None:
        """Divide a term's gradients by the number of ranks, and start to add them up.

        Args:
            name: the term's.
            gradients: one per parameter, views into the row; where there is none the row is zero.
            memory: what holds them.
            row: the term's.
        """
        flats = [rows[row] for rows in memory.rows]
        torch._foreach_div_(flats, float(dist.get_world_size(self.group)))  # first: sums overflow in fp16
        work = [dist.all_reduce(flat, group=self.group, async_op=True) for flat in flats]
        self._sent[name] = memory, row, [gradient is not None for gradient in gradients], work

    def receive(self) -> TermGradients:
        """Wait for what was sent."""
        reached = reached_anywhere([reached for _, _, reached, _ in self._sent.values()], self.group)
        averaged: TermGradients = {}
        sent, self._sent = self._sent, {}
        for (name, (memory, row, _, work)), anywhere in zip(sent.items(), reached, strict=True):
            for one in work:
                one.wait()
            averaged[name] = [view if flag else None for view, flag in zip(memory.views[row], anywhere, strict=True)]
        return averaged


def mean_over(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The mean over the processes of a group, out of place."""
    mean = tensor / dist.get_world_size(group)
    dist.all_reduce(mean, group=group)
    return mean


def averaging_of(processes: Processes) -> Averaging | None:
    """What averages over the processes; ``None`` if they do not average now."""
    return Averaging(processes.group) if processes.group is not None and processes.averages else None
