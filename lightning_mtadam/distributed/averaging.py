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


class FlatGradients:
    """Memory for the gradients of one term: a flat tensor per device and dtype, which travels as it is.

    Args:
        parameters: what the gradients belong to; those that are not trained get no memory.

    Attributes:
        flats: the flat tensors.
        views: one per parameter, into them; ``None`` where it is not trained.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad:
                together.setdefault((parameter.device, parameter.dtype), []).append(index)
        self.flats: list[Tensor] = []
        self.views: list[Tensor | None] = [None] * len(parameters)
        for (device, dtype), indices in together.items():
            sizes = [parameters[index].numel() for index in indices]
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            self.flats.append(flat)
            for index, piece in zip(indices, torch.split(flat, sizes), strict=True):
                self.views[index] = piece.view(parameters[index].shape)

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it was made for parameters like these."""
        return len(parameters) == len(self.views) and all(
            (not parameter.requires_grad)
            if view is None
            else parameter.requires_grad
            and (view.shape, view.dtype, view.device) == (parameter.shape, parameter.dtype, parameter.device)
            for parameter, view in zip(parameters, self.views, strict=True)
        )


class Averaging:
    """Sends each term's gradients off as soon as they are there, and receives their averages.

    A parameter that a term reaches on some ranks only has a gradient on all of them: on the others it counts as zero.

    Args:
        group: the processes.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._sent: dict[str, tuple[FlatGradients, list[bool], list[Work]]] = {}

    def send(self, name: str, gradients: Sequence[Tensor | None], memory: FlatGradients) -> None:
        """Divide a term's gradients by the number of ranks, and start to add them up.

        Args:
            name: the term's.
            gradients: one per parameter, in ``memory`` as a rule; those that are not are copied there.
            memory: what travels.
        """
        for gradient, view in zip(gradients, memory.views, strict=True):
            if view is not None and gradient is not view:
                view.zero_() if gradient is None else view.copy_(gradient)
        torch._foreach_div_(memory.flats, float(dist.get_world_size(self.group)))  # first: sums overflow in fp16
        work = [dist.all_reduce(flat, group=self.group, async_op=True) for flat in memory.flats]
        self._sent[name] = memory, [gradient is not None for gradient in gradients], work

    def receive(self) -> TermGradients:
        """Wait for what was sent."""
        reached = reached_anywhere([reached for _, reached, _ in self._sent.values()], self.group)
        averaged: TermGradients = {}
        for (name, (memory, _, work)), anywhere in zip(self._sent.items(), reached, strict=True):
            for one in work:
                one.wait()
            averaged[name] = [view if flag else None for view, flag in zip(memory.views, anywhere, strict=True)]
        return averaged
