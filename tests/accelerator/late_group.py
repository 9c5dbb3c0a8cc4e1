"""All-reduces of the stand-in's tensors, over gloo, whose results are there after ``wait()`` and not before, as NCCL's.

A way in which they come is ``EARLY`` or ``LATE``. Early ones take the values when they are issued, and spoil the tensor
until it is waited for: who reads it before that, or writes to it and counts on that, is found out. Late ones take the
values when they are waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from tests.accelerator.device import NAME, native

Way = Literal["early", "late"]


class _Work:
    """What an asynchronous all-reduce returns."""

    def __init__(self, tensor: Tensor, group: Any, way: Way, reduce: Any) -> None:
        self.memory, self.group, self.way, self.reduce = native().data_of(tensor), group, way, reduce
        if way == "early":
            self.result = self.memory.clone()
            reduce(self.result, group=group)
            self.memory.fill_(float("nan"))

    def wait(self) -> None:
        if self.way == "early":
            self.memory.copy_(self.result)
        else:
            self.reduce(self.memory, group=self.group)


@contextmanager
def late_all_reduces(way: Way) -> Iterator[list[tuple[tuple[int, ...], bool]]]:
    """Within it, and what it gives is what was sent: shapes, and whether asynchronously."""
    real, sent = dist.all_reduce, list[tuple[tuple[int, ...], bool]]()

    def all_reduce(tensor: Tensor, *arguments: Any, group: Any = None, async_op: bool = False, **options: Any) -> Any:
        if tensor.device.type != NAME:
            return real(tensor, *arguments, group=group, async_op=async_op, **options)
        sent.append((tuple(tensor.shape), async_op))
        work = _Work(tensor, group, way, real)
        if async_op:
            return work
        return work.wait()

    dist.all_reduce = all_reduce
    try:
        yield sent
    finally:
        dist.all_reduce = real
