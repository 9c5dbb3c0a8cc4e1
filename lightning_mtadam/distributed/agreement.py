"""Makes processes agree on what they are about to do, so that a difference raises on all of them and none hangs.

What is agreed on is known on the host: it travels over a gloo group of its own, whatever the gradients travel over. So
no accelerator is waited for, and a process that has failed can say so while the others are at any other collective.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PATIENCE = 10.0
"""How many seconds a process that has failed waits for the others to hear of it."""

Parameters: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Announcement:
    """What a rank is about to do.

    Attributes:
        terms: its terms.
        constant: those of them that have no graph in this batch.
        parameters: the names and shapes of what it trains.
        averages: whether it averages the gradients now.
        has_sync_batch_norm: whether its network has ``SyncBatchNorm``; said only if one of its terms has no graph.
        reached: which terms reach which parameters, [I][P]; known, and announced, after the backward passes.
        error: what it failed with.
    """

    terms: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    parameters: Parameters = ()
    averages: bool = False
    has_sync_batch_norm: bool = False
    reached: tuple[tuple[bool, ...], ...] = ()
    error: str | None = None


class RankError(RuntimeError):
    """Another rank has failed, or is gone."""


Everyone: TypeAlias = Mapping[int, Announcement]
"""What each rank has announced; ranks are counted over all processes, in the order of the group."""


@cache  # to make one is a collective: no rank may forget what another remembers
def host_group(group: ProcessGroup) -> ProcessGroup:
    """The gloo group over which the processes of ``group`` agree; the first call must come from all of them."""
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def agree(mine: Announcement, group: ProcessGroup) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare the announcements of all ranks; one small collective where they are the same.

    Args:
        mine: this rank's.
        group: the processes.

    Returns:
        The terms in the order of the group's first rank; those of them that have no graph on any rank.

    Raises:
        ValueError: the ranks differ; the message says which rank has what.
        RankError: another rank has failed, or is gone.
    """
    everyone = _hear(mine, group)
    _check_terms(everyone)
    _check_parameters(everyone)
    if len({other.averages for other in everyone.values()}) > 1:
        averaging = [rank for rank, other in everyone.items() if other.averages]
        raise ValueError(
            f"Only the ranks {averaging} average gradients in this batch, the others accumulate them. Accumulate the"
            " same number of batches on every rank."
        )
    return _first(everyone).terms, _constant_everywhere(everyone)


def tell(error: BaseException, group: ProcessGroup) -> None:
    """Tell the other ranks, at their next agreement, that this one has failed; wait for them a few seconds at most.

    An error that was told already, or that another rank told, is not told again.
    """
    if isinstance(error, RankError) or getattr(error, "told_to_the_other_ranks", False):
        return
    error.told_to_the_other_ranks = True  # type: ignore[attr-defined]
    with contextlib.suppress(RuntimeError):  # they are gone, or elsewhere
        _exchange(Announcement(error=f"{type(error).__name__}: {error}"), host_group(group), PATIENCE)


def reached_anywhere(reached: Sequence[Sequence[bool]], group: ProcessGroup) -> list[list[bool]]:
    """Whether any rank's terms reach the parameters: [I][P] of this rank -> [I][P] of all.

    Raises:
        RankError: another rank has failed in its backward passes, or is gone.
    """
    everyone = _hear(Announcement(reached=tuple(map(tuple, reached))), group)
    by_rank = [other.reached for other in everyone.values()]
    return [[any(flags) for flags in zip(*rows, strict=True)] for rows in zip(*by_rank, strict=True)]


def _hear(mine: Announcement, group: ProcessGroup) -> Everyone:
    """What everyone announces, unless one of them has failed."""
    try:
        everyone = _exchange(mine, host_group(group))
    except RuntimeError as lost:
        raise RankError(
            "Another process of this training has stopped without a word, or has not come for half an hour. Look for"
            " its own message."
        ) from lost
    failed = [f"rank {rank}: {other.error}" for rank, other in everyone.items() if other.error is not None]
    if failed:
        raise RankError("Stopped, because another rank has failed. " + "; ".join(failed))
    return everyone


def _exchange(mine: Announcement, group: ProcessGroup, patience: float | None = None) -> Everyone:
    """The announcements of all ranks. If they are the same, only digests travel."""
    ranks = dist.get_process_group_ranks(group)
    digest, message = _encode(mine)
    heads = _gather(torch.tensor([digest, len(message)], device="cpu"), group, patience)
    if all(int(head[0]) == digest for head in heads):
        return dict.fromkeys(ranks, mine)
    longest = max(int(head[1]) for head in heads)
    padded = torch.frombuffer(bytearray(message.ljust(longest, b"\0")), dtype=torch.uint8)
    announcements = [pickle.loads(bytes(found.tolist())) for found in _gather(padded, group, patience)]
    return dict(zip(ranks, announcements, strict=True))


def _gather(tensor: Tensor, group: ProcessGroup, patience: float | None) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(found, tensor, group=group, async_op=True)
    _wait(work, patience)
    return found


def _wait(work: dist.Work, patience: float | None) -> None:
    """Wait for the other ranks, in Python: signals get through, such as the one by which Lightning ends a run."""
    end, pause = time.monotonic() + (math.inf if patience is None else patience), 2e-5
    while not work.is_completed():
        if time.monotonic() > end:
            raise RuntimeError(f"The other ranks did not come within {patience} s.")
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)
    work.wait()  # raises what went wrong


@lru_cache(maxsize=16)
def _encode(announcement: Announcement) -> tuple[int, bytes]:
    message = pickle.dumps(announcement)
    return int.from_bytes(hashlib.sha256(repr(announcement).encode()).digest()[:7], "big"), message


def _first(everyone: Everyone) -> Announcement:
    return next(iter(everyone.values()))


def _check_terms(everyone: Everyone) -> None:
    if len({frozenset(other.terms) for other in everyone.values()}) > 1:
        found = "; ".join(f"rank {rank} has {other.terms}" for rank, other in everyone.items())
        raise ValueError(
            f"The ranks have different terms: {found}. Every rank must return the same terms in every step. Where a"
            " batch has nothing for a term, return a loss of zero, e.g. torch.zeros(())."
        )


def _check_parameters(everyone: Everyone) -> None:
    common = frozenset.intersection(*(frozenset(other.parameters) for other in everyone.values()))
    own = {
        rank: ", ".join(f"{name} {shape}" for name, shape in other.parameters if (name, shape) not in common)
        for rank, other in everyone.items()
    }
    if any(own.values()):
        found = "; ".join(f"rank {rank} has {mine or 'nothing else'}" for rank, mine in own.items())
        raise ValueError(
            f"The ranks train different parameters: beside what they share, {found}. Build the same network, and"
            " freeze the same part of it, on every rank."
        )
    if len({other.parameters for other in everyone.values()}) > 1:
        raise ValueError(
            "The ranks give the same parameters to the optimizer in another order. Build it alike on every rank."
        )


def _constant_everywhere(everyone: Everyone) -> tuple[str, ...]:
    """The terms that have no graph on any rank."""
    for rank, other in everyone.items():
        if other.has_sync_batch_norm:
            raise ValueError(
                f"losses[{other.constant[0]!r}] has no graph on rank {rank}, but the network has SyncBatchNorm, of"
                " which every backward pass needs all ranks. Return a loss of zero that hangs on the graph instead,"
                " e.g. 0.0 * output.sum()."
            )
    return tuple(name for name in _first(everyone).terms if all(name in other.constant for other in everyone.values()))
