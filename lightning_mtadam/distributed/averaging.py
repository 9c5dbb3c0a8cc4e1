"""Averages over the processes of a group, each term's gradients while the next term's are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mtadam.distributed.agreement import reached_anywhere

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work


class Averaging:
    """Sends each term's gradients off as soon as they are there, and receives their averages in the same memory.

    A parameter that a term reaches on some ranks only has a gradient on all of them: on the others it counts as zero.

    Args:
        group: the processes.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._reached: list[list[bool]] = []
        self._work: list[Work] = []

    def send(self, flats: Sequence[Tensor], reached: list[bool]) -> None:
        """Divide a term's gradients by the number of ranks, and start to add them up.

        Args:
            flats: its gradients, for each device and dtype; zero where there is none.
            reached: per parameter, whether there is one.
        """
        torch._foreach_div_(list(flats), float(dist.get_world_size(self.group)))  # first: sums overflow in fp16
        self._work += [dist.all_reduce(flat, group=self.group, async_op=True) for flat in flats]
        self._reached.append(reached)

    def receive(self) -> list[list[bool]]:
        """Wait for what was sent. Whether each term, in the order of sending, reaches each parameter on any rank."""
        reached = reached_anywhere(self._reached, self.group)
        for work in self._work:
            work.wait()
        self._reached, self._work = [], []
        return reached


def mean_over(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The mean over the processes of a group, out of place."""
    mean = tensor / dist.get_world_size(group)
    dist.all_reduce(mean, group=group)
    return mean
