"""Averages over the processes of a group, each term's gradients while the next term's are computed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mtadam.distributed import agreement
from lightning_mtadam.distributed.agreement import Announcement, Everyone, Sent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work


class Averaging:
    """Sends each term's gradients off as soon as they are there, and receives their averages in the same memory.

    A parameter that a term reaches on some ranks only has a gradient on all of them: on the others it counts as zero.

    Args:
        group: the processes.
        devices: those of this rank's parameters, in order.

    Attributes:
        mine: what this rank announces beside what its terms reach.
        absent: the terms that turned out to have no graph on any rank.
    """

    def __init__(self, group: ProcessGroup, devices: Sequence[torch.device]) -> None:
        self.group, self.devices = group, list(devices)
        self.mine, self.absent = Announcement(), tuple[str, ...]()
        self._reached: list[tuple[bool, ...]] = []
        self._work: list[Work] = []
        self._sent: list[tuple[int, torch.dtype, int]] = []

    def send(self, flats: Sequence[Tensor], reached: Sequence[bool]) -> None:
        """Divide a term's gradients by the number of ranks, and start to add them up.

        Args:
            flats: its gradients, for each device and dtype; zero where there is none.
            reached: per parameter, whether there is one.
        """
        torch._foreach_div_(list(flats), float(dist.get_world_size(self.group)))  # first: sums overflow in fp16
        for flat in flats:
            self._work.append(dist.all_reduce(flat, group=self.group, async_op=True))
            self._sent.append((flat.numel(), flat.dtype, self.devices.index(flat.device)))
        self._reached.append(tuple(reached))

    def receive(self) -> list[list[bool]]:
        """Wait for what was sent. Whether each term, in the order of sending, reaches each parameter on any rank.

        Raises:
            ValueError: the ranks differ in what they announce.
            RankError: another rank has failed, or is gone.
        """
        mine = replace(self.mine, done=True, reached=tuple(self._reached), sent=tuple(self._sent))
        _, everyone = self._compare(mine)
        for work in self._work:
            work.wait()
        self._reached, self._work, self._sent = [], [], []
        return agreement.reached_anywhere(everyone)

    def agree(self) -> tuple[str, ...]:
        """The terms in an order on which all ranks agree, before anything is sent. Raises as :meth:`receive` does."""
        return self._compare(self.mine)[0]

    def _compare(self, mine: Announcement) -> tuple[tuple[str, ...], Everyone]:
        everyone = agreement.hear(mine, self.group)
        try:
            terms, self.absent = agreement.compare(everyone)
            agreement.check_graphs(terms, self.absent)
        except Exception as error:  # which all ranks raise alike
            agreement.is_told(error)
            self.complete(everyone)
            raise
        return terms, everyone

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks of an error on this one, and complete what they have begun."""
        everyone = agreement.tell(error, self.group, tuple(self._sent))
        if everyone is not None:
            self.complete(everyone)

    def complete(self, everyone: Everyone) -> None:
        """Take part in what other ranks have begun and this one has not, so that none of it meets what comes later."""
        longest: Sent = max((other.sent for other in everyone.values()), key=len)
        for size, dtype, place in longest[len(self._sent) :]:
            nothing = torch.zeros(size, dtype=dtype, device=self.devices[place])
            self._work.append(dist.all_reduce(nothing, group=self.group, async_op=True))
        end = time.monotonic() + agreement.PATIENCE
        for work in self._work:
            while not work.is_completed() and time.monotonic() < end:
                time.sleep(1e-3)
            if not work.is_completed():
                agreement.give_up(self.group)
        self._work = []


def devices_of(parameters: Sequence[Tensor]) -> list[torch.device]:
    """The devices of parameters, in order."""
    return list(dict.fromkeys(parameter.device for parameter in parameters))


def mean_over(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The mean over the processes of a group, out of place."""
    mean = tensor / dist.get_world_size(group)
    dist.all_reduce(mean, group=group)
    return mean


def means_over_ranks(
    numbers: Mapping[str, Tensor], device: torch.device, *, agreed: bool
) -> tuple[tuple[str, ...], Tensor]:
    """The mean of each number over those of all processes that have it; the same on all of them.

    The host does not wait for an accelerator.

    Args:
        numbers: scalars, by name.
        device: where the processes reduce.
        agreed: whether they are known to have the same names; else they tell each other.

    Returns:
        The names that any process has, in the same order on all; their means, [n], float64.
    """
    group = dist.group.WORLD
    assert group is not None
    counts = dict.fromkeys(sorted(numbers), dist.get_world_size())
    if not agreed:
        counts = agreement.count_terms(tuple(numbers), group)
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    shares = [numbers[name].to(nothing) / count if name in numbers else nothing for name, count in counts.items()]
    means = torch.stack(shares)
    dist.all_reduce(means, group=group)
    return tuple(counts), means
