"""A link of a given speed between processes that run on one machine, and steps timed over it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mtadam import MTAdam


class SlowLink:
    """Stands in for ``dist.all_reduce``: one transfer at a time, each as long as its bytes take.

    Args:
        seconds_per_byte: the inverse of the link's speed.
        overlap: whether a transfer goes on while its caller does something else.
    """

    def __init__(self, seconds_per_byte: float, *, overlap: bool) -> None:
        self.seconds_per_byte, self.overlap = seconds_per_byte, overlap
        self.queue = ThreadPoolExecutor(1)
        self.transfers: list[int] = []
        self.all_reduce = dist.all_reduce

    def __call__(self, tensor: Tensor, *, group: dist.ProcessGroup, async_op: bool) -> Transfer:
        assert async_op
        self.transfers.append(tensor.nbytes)
        transfer = Transfer(self.queue.submit(self._send, tensor, group))
        if not self.overlap:
            transfer.wait()
        return transfer

    def _send(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        end = time.perf_counter() + tensor.nbytes * self.seconds_per_byte
        self.all_reduce(tensor, group=group)
        time.sleep(max(0, end - time.perf_counter()))


class Transfer:
    """What ``all_reduce(..., async_op=True)`` returns."""

    def __init__(self, future: Future[None]) -> None:
        self.future = future

    def wait(self) -> None:
        """Return when the transfer has ended."""
        self.future.result()


@contextmanager
def over(link: SlowLink):
    """Let the terms' gradients travel over the link."""
    with mock.patch("lightning_mtadam.distributed.averaging.dist.all_reduce", link):
        yield


def seconds_per_step(
    network: nn.Module,
    make_losses: Callable[[nn.Module], dict[str, Tensor]],
    seconds_per_byte: float,
    repeats: int,
) -> dict[str, float]:
    """The median time of a step over a link, with the overlap and without it, taken in turn.

    Returns:
        "overlap" and "no overlap", in seconds; and "bytes", what a rank sent in a step.
    """
    model = nn.parallel.DistributedDataParallel(network)
    optimizer = MTAdam(network.named_parameters(), lr=1e-4)
    times: dict[str, list[float]] = {"overlap": [], "no overlap": []}
    for _ in range(repeats + 1):
        for name in times:
            link = SlowLink(seconds_per_byte, overlap=name == "overlap")
            with over(link):
                dist.barrier()
                start = time.perf_counter()
                optimizer.backward(make_losses(model), model=model)
                optimizer.step()
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    return {**medians, "bytes": sum(link.transfers), "transfers": len(link.transfers)}


def backward_seconds(network: nn.Module, make_losses: Callable[[nn.Module], dict[str, Tensor]], repeats: int) -> float:
    """The median time of one term's backward pass."""
    parameters, times = list(network.parameters()), []
    for _ in range(repeats):
        losses = list(make_losses(network).values())
        start = time.perf_counter()
        for loss in losses:
            torch.autograd.grad(loss, parameters, retain_graph=True)
        times.append((time.perf_counter() - start) / len(losses))
    return statistics.median(times)
