"""Real processes over gloo, forked from the test: quick to start, and never left behind."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_mtadam.distributed import agreement

PATIENCE = 60.0
"""Seconds for which a rank that failed waits for the others here. Who took less has not waited in vain."""

TWO_OR_THREE = pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
"""How many processes train: two quickly, three too in the slow run."""

HANGS = 300.0
"""Seconds after which a program is taken to hang. Beside twelve others it takes ten times as long as alone."""


@dataclass
class Outcome:
    """What became of a rank.

    Attributes:
        result: what its function returned.
        error: the error it raised, as "Type: message"; ``None`` if it returned; "gone" if it ended without a word.
        seconds: how long it took.
    """

    result: Any
    error: str | None
    seconds: float


def run_ranks(
    function: Callable[..., Any], folder: Path, *arguments: Any, ranks: int = 2, timeout: float = HANGS
) -> list[Outcome]:
    """Call ``function(rank, *arguments)`` in as many processes, joined in the default process group.

    A Lightning trainer with ``strategy="ddp"`` (or another) and ``devices=ranks`` takes the processes as they are.

    Args:
        function: what each process does. What it returns must be something that ``torch.save`` can save.
        folder: an empty folder.
        arguments: for the function.
        ranks: the number of processes.
        timeout: seconds after which the processes are killed.

    Raises:
        TimeoutError: a process hung.
    """
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_child, args=(function, rank, ranks, folder, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    if hanging:
        raise TimeoutError(f"ranks {hanging} hung for {timeout} s")
    return [_outcome(folder / f"outcome{rank}") for rank in range(ranks)]


def results(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned; fails if one raised."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank}: {outcome.error}"
    return [outcome.result for outcome in outcomes]


def _outcome(file: Path) -> Outcome:
    return torch.load(file, weights_only=False) if file.exists() else Outcome(None, "gone", 0)


def _child(function: Callable[..., Any], rank: int, ranks: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    agreement.PATIENCE = PATIENCE
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    rank_zero_only.rank = rank  # what was inherited is the parent's, and holds until a trainer is made
    start = time.monotonic()
    result, error = None, None
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        dist.barrier()  # or a rank that is done at once leaves while another still connects to it
        result = function(rank, *arguments)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
        (folder / f"traceback{rank}").write_text(traceback.format_exc())
    torch.save(Outcome(result, error, time.monotonic() - start), folder / f"outcome{rank}")
    os._exit(0)  # no clean-up of what belongs to the parent; the others' connections are closed as by a crash
