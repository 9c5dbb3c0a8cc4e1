"""Peak memory, as the operating system counts it, of work in a process of its own (Linux)."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""Memory that is freed goes back to the system at once, from 64 KiB on: otherwise glibc's own guess decides."""


def in_a_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a function of a module in a new process."""
    os.environ.update(MALLOC)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def peak_of(make: Callable[[], Callable[[], object]], steps: int = 3) -> int:
    """The most bytes that some steps hold, beyond what was held before the first one.

    What the process keeps for good (code, threads, compiled kernels) is there already: a first set has taken its steps
    and is gone.

    Args:
        make: makes everything that is trained, and returns what takes a step.
        steps: how many.
    """
    torch.set_num_threads(1)
    for _ in range(2):
        take_step = make()
        gc.collect()
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        for _ in range(steps):
            take_step()
        peak = _memory("VmHWM") - before
        del take_step
    return peak


def _memory(key: str) -> int:
    (kilobytes,) = re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)
