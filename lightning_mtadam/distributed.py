"""Averages the terms' gradients over the processes of a group, and makes the processes agree on the terms."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def agree_on_terms(
    names: Sequence[str], group: dist.ProcessGroup, device: torch.device, error: Exception | None = None
) -> tuple[str, ...]:
    """Compare the terms of all ranks; one small collective where they are the same.

    Args:
        names: this rank's terms.
        group: the processes.
        device: where its backend communicates.
        error: what this rank found wrong with its losses. It is raised here, after the other ranks were told.

    Returns:
        The names in the order of the group's first rank.

    Raises:
        ValueError: the ranks have different terms, or the losses of another rank are bad; the message says which.
    """
    mine = (None if error is None else f"{type(error).__name__}: {error}", tuple(names))
    digest = torch.tensor(int.from_bytes(hashlib.sha256(repr(mine).encode()).digest()[:7], "big"), device=device)
    digests = [torch.empty_like(digest) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, digest, group=group)
    if error is None and bool((torch.stack(digests) == digest).all()):
        return mine[1]
    everyone: list[tuple[str | None, tuple[str, ...]]] = [mine] * len(digests)
    dist.all_gather_object(everyone, mine, group=group)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(everyone) if text is not None]
    if failed:
        raise ValueError("The losses are bad on " + "; ".join(failed))
    if len({frozenset(terms) for _, terms in everyone}) > 1:
        found = "; ".join(f"rank {rank} has {terms}" for rank, (_, terms) in enumerate(everyone))
        raise ValueError(
            f"The ranks have different terms: {found}. Every rank must return the same terms in every step. Where a"
            " batch has nothing for a term, return a loss of zero that hangs on the graph, e.g. 0.0 * output.sum()."
        )
    return everyone[0][1]


def average_gradients(
    found: Iterator[tuple[str, list[Tensor | None]]], parameters: Sequence[Tensor], group: dist.ProcessGroup
) -> Iterator[tuple[str, list[Tensor | None]]]:
    """Average each term's gradients over the group while the next term's are computed.

    Args:
        found: the terms' gradients, as they come.
        parameters: the parameters they belong to.
        group: the processes.

    Yields:
        The same, averaged, once the last term has been sent off. A parameter that a term reaches on some ranks only
        has a gradient on all of them: on the others it counts as zero.
    """
    travelling = [(name, _Average(gradients, parameters, group)) for name, gradients in found]
    for name, average in travelling:
        yield name, average.wait()


class _Average:
    """One term's gradients on their way: flat, one buffer per device and dtype, with a flag for each parameter."""

    def __init__(
        self, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], group: dist.ProcessGroup
    ) -> None:
        self.parameters = parameters
        self.ranks = dist.get_world_size(group)
        self.buckets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad:
                self.buckets.setdefault((parameter.device, parameter.dtype), []).append(index)
        self.flat = [self._flatten(gradients, indices) for indices in self.buckets.values()]
        self.work = [dist.all_reduce(flat, group=group, async_op=True) for flat in self.flat]

    def _flatten(self, gradients: Sequence[Tensor | None], indices: list[int]) -> Tensor:
        first = self.parameters[indices[0]]
        pieces = [
            self.parameters[index].new_zeros(()).expand(self.parameters[index].numel())
            if (gradient := gradients[index]) is None
            else gradient.reshape(-1)
            for index in indices
        ]
        reached = first.new_tensor([gradients[index] is not None for index in indices])
        return torch.cat([*pieces, reached])

    def wait(self) -> list[Tensor | None]:
        """The averaged gradients."""
        averaged: list[Tensor | None] = [None] * len(self.parameters)
        for work, flat, indices in zip(self.work, self.flat, self.buckets.values(), strict=True):
            work.wait()
            flat /= self.ranks
            sizes = [self.parameters[index].numel() for index in indices]
            *pieces, reached = torch.split(flat, [*sizes, len(indices)])
            for index, piece, anywhere in zip(indices, pieces, reached.tolist(), strict=True):
                if anywhere:
                    averaged[index] = piece.view_as(self.parameters[index])
        return averaged
