"""Brings the losses of all processes together: before any of them is differentiated, or with what they reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_mtadam.distributed.agreement import Announcement, Numbers, Parameters
from lightning_mtadam.distributed.processes import Processes
from lightning_mtadam.terms import Losses, plain


def alike(losses: Losses, parameter: Tensor) -> Losses:
    """The losses, where constants have the dtype and the device of a loss with a graph, or else of a parameter."""
    like = next((loss for loss in losses.values() if loss.requires_grad), parameter)
    return {name: loss if loss.requires_grad else loss.to(like) for name, loss in losses.items()}


@dataclass
class Ranks:
    """What the ranks know of each other, from batch to batch.

    Attributes:
        late: whether they may agree on the losses after the backward passes, with what these reach: one exchange less.
        options: what all of them must have set alike; told in the first batch.
        changing: what of this may change; told in each.
        parameters: what they agreed to train in the last batch; ``None`` before the first.
        synced: whether the network has ``SyncBatchNorm``; ``None`` until it was looked at.
        seen: the terms that were not absent in every step so far.
        early: whether it must be known before the backward passes of this batch which terms are absent.
    """

    late: bool
    options: Numbers = ()
    changing: Numbers = ()
    parameters: Parameters | None = None
    synced: bool | None = None
    seen: set[str] = field(default_factory=set)
    early: bool = False

    def announce(
        self,
        losses: Losses,
        parameters: Parameters,
        pending: Sequence[str],
        processes: Processes,
        model: nn.Module | None,
    ) -> Announcement:
        """What this rank has to say of its losses; ``pending`` are the terms of earlier batches of the same step."""
        if self.synced is None:
            modules = () if model is None else model.modules()
            self.synced = any(isinstance(module, nn.SyncBatchNorm) for module in modules)
        constant = tuple(name for name, loss in losses.items() if not loss.requires_grad)
        options = (*(() if self.parameters is not None else self.options), *self.changing)
        names, synced = tuple(dict.fromkeys((*pending, *losses))), self.synced and bool(constant)
        return Announcement(names, constant, parameters, processes.averages, synced, processes.sharded, options)

    def agree_before(self, mine: Announcement) -> bool:
        """Whether they must agree before the backward passes: what these send depends on it, or they wait in these."""
        known = self.parameters == mine.parameters and self.seen.issuperset(mine.terms)
        return not self.late or not mine.averages or not known or bool(self.synced) or self.early


def told_options(options: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Numbers:
    """What must be the same on all ranks, as they tell each other: what holds for all, and the groups' numbers."""
    told = [(name, _name_of(value) if callable(value) else repr(value)) for name, value in options.items()]
    for index, group in enumerate(groups):
        where = f" of group {index}" if len(groups) > 1 else ""
        names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
        told += [(f"{name}{where}", repr(plain(group[name]))) for name in names]
    return tuple(told)


def _name_of(rule: Callable[[str], str]) -> str:
    """A function by its name: what else stands for it differs between processes."""
    return getattr(rule, "__qualname__", type(rule).__qualname__)
