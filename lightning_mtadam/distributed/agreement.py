"""Makes processes agree on what they are about to do, so that a difference raises on all of them and none hangs.

What is agreed on is known on the host: it travels over a gloo group of its own, whatever the gradients travel over. So
no accelerator is waited for, and a process that has failed can say so while the others are at any other collective.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import math
import pickle
import time
from collections import Counter
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
"""The names and shapes of what is trained."""

Numbers: TypeAlias = tuple[tuple[str, str], ...]
"""The names and values of what all ranks must have set alike."""

Sent: TypeAlias = tuple[tuple[int, torch.dtype, int], ...]
"""Of each collective that was begun the elements, their dtype, and the place of their device among a rank's own."""


@dataclass(frozen=True)
class Announcement:
    """What a rank is about to do.

    Attributes:
        terms: its terms.
        constant: those of them that have no graph in this batch.
        parameters: the names and shapes of what it trains.
        averages: whether it averages the gradients now.
        has_sync_batch_norm: whether its network has ``SyncBatchNorm``; said only if one of its terms has no graph.
        sharded: whether its parameters are sharded.
        options: what all ranks must have set alike; said in the first step, and in each if it may change.
        done: whether its backward passes are done. Then are known, and announced:
        reached: which terms reach which parameters, [I][P];
        sent: the collectives that it has begun.
        error: what it failed with.
    """

    terms: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    parameters: Parameters = ()
    averages: bool = False
    has_sync_batch_norm: bool = False
    sharded: bool = False
    options: Numbers = ()
    done: bool = False
    reached: tuple[tuple[bool, ...], ...] = ()
    sent: Sent = ()
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


atexit.register(host_group.cache_clear)  # its threads must end before Python does


def compare(everyone: Everyone) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare the announcements of all ranks.

    Returns:
        The terms in the order of the group's first rank; those of them that have no graph on any rank.

    Raises:
        ValueError: the ranks differ; the message says which rank has what.
        RankError: another rank has failed.
    """
    _check_failed(everyone)
    _check_terms(everyone)
    _check_parameters(everyone)
    _check_options(everyone)
    if len({other.averages for other in everyone.values()}) > 1:
        averaging = [rank for rank, other in everyone.items() if other.averages]
        raise ValueError(
            f"Only the ranks {averaging} average gradients in this batch, the others accumulate them. Accumulate the"
            " same number of batches on every rank."
        )
    return _first(everyone).terms, _constant_everywhere(everyone)


def count_terms(terms: tuple[str, ...], group: ProcessGroup) -> dict[str, int]:
    """How many ranks have each of the terms that any has, in the same order on all; ``RankError`` if one has failed."""
    everyone = hear(Announcement(terms=terms), group)
    _check_failed(everyone)
    return dict(sorted(Counter(name for other in everyone.values() for name in other.terms).items()))


def tell(error: BaseException, group: ProcessGroup, sent: Sent = ()) -> Everyone | None:
    """Tell the other ranks, at their next agreement, that this one has failed; wait for them a few seconds at most.

    An error that was told already, or that another rank told, is not told again. Gives what the others announced, or
    ``None`` if they are gone, or elsewhere.
    """
    if isinstance(error, RankError) or getattr(error, "told_to_the_other_ranks", False):
        return None
    is_told(error)
    mine = Announcement(error=f"{type(error).__name__}: {error}", done=True, sent=sent)
    with contextlib.suppress(RuntimeError):
        return _exchange(mine, host_group(group), PATIENCE)
    give_up(group)  # nobody knows what they will be at when they come
    return None


def check_graphs(terms: Sequence[str], absent: Sequence[str]) -> None:
    """Raise if all terms are ``absent``, as they have no graph on any rank."""
    if absent and len(absent) == len(terms):
        raise ValueError(
            f"losses[{absent[0]!r}] has no graph on any rank, nor has any other of {tuple(terms)}: all are constant"
            " zeros, so there is nothing to train on. Compute one at least from the network's output without .detach(),"
            " .data or torch.no_grad(), or leave out this batch on every rank."
        )


def is_told(error: BaseException) -> None:
    """Note that the other ranks know of it."""
    error.told_to_the_other_ranks = True  # type: ignore[attr-defined]


def reached_anywhere(everyone: Everyone) -> list[list[bool]]:
    """Whether any rank's terms reach the parameters: [I][P]."""
    by_rank = [other.reached for other in everyone.values()]
    return [[any(flags) for flags in zip(*rows, strict=True)] for rows in zip(*by_rank, strict=True)]


def hear(mine: Announcement, group: ProcessGroup) -> Everyone:
    """What everyone announces; once more while this rank is done and others, which did not fail, are not."""
    if group in _given_up:
        raise RankError(
            "Another rank has failed in an earlier step, and did not hear of this one in time: what they had begun"
            " together cannot be completed. Start the training anew."
        )
    try:
        everyone = _exchange(mine, host_group(group))
        while mine.done and not all(other.done or other.error for other in everyone.values()) and _alike(everyone):
            everyone = _exchange(mine, host_group(group))
    except RuntimeError as lost:
        give_up(group)
        raise RankError(
            "Another process of this training has stopped without a word, has failed and not waited, or has not come"
            " for half an hour. Look for its own message."
        ) from lost
    return everyone


_given_up: set[ProcessGroup] = set()


def give_up(group: ProcessGroup) -> None:
    """Let all that these processes try together from now on raise."""
    _given_up.add(group)


def _alike(everyone: Everyone) -> bool:
    """Whether those that are not done yet will come again: they do unless the ranks differ."""
    try:
        compare(everyone)
    except (ValueError, RankError):
        return False
    return True


def _exchange(mine: Announcement, group: ProcessGroup, patience: float | None = None) -> Everyone:
    """The announcements of all ranks. If they are the same, only digests travel."""
    ranks = dist.get_process_group_ranks(group)
    digest, message = _encode(mine)
    heads = _gather(torch.tensor([digest, len(message), int(mine.error is not None)], device="cpu"), group, patience)
    if all(int(head[0]) == digest for head in heads):
        return dict.fromkeys(ranks, mine)
    if any(int(head[2]) for head in heads):
        patience = PATIENCE  # who has failed may have gone on
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


def _check_failed(everyone: Everyone) -> None:
    failed = [f"rank {rank}: {other.error}" for rank, other in everyone.items() if other.error is not None]
    if failed:
        raise RankError("Stopped, because another rank has failed. " + "; ".join(failed))


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


def _check_options(everyone: Everyone) -> None:
    """Those that say theirs must say the same."""
    told = {rank: dict(other.options) for rank, other in everyone.items() if other.options}
    for name in next(iter(told.values()), {}):
        values = {rank: options[name] for rank, options in told.items() if name in options}
        if len(set(values.values())) > 1:
            found = "; ".join(f"rank {rank} has {value}" for rank, value in values.items())
            raise ValueError(
                f"The ranks have different values of the option {name}: {found}. Build the optimizer or the balancer"
                " with the same options on every rank; change them, as by set_importance, on all before the same step."
            )


def _constant_everywhere(everyone: Everyone) -> tuple[str, ...]:
    """The terms that have no graph on any rank."""
    absent = [name for name in _first(everyone).terms if all(name in other.constant for other in everyone.values())]
    for rank, other in everyone.items():
        here = [name for name in other.constant if name not in absent]
        if here and (other.has_sync_batch_norm or other.sharded):
            why = "the network has SyncBatchNorm" if other.has_sync_batch_norm else "the parameters are sharded"
            raise ValueError(
                f"losses[{here[0]!r}] has no graph on rank {rank}, but {why}: every backward pass needs all ranks."
                " Return a loss of zero that hangs on the graph instead, e.g. 0.0 * output.sum()."
            )
    return tuple(absent)
