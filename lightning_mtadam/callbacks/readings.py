"""What balances the terms of a trainer, read: the weights by layer and term, of the layers that train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtadam.balancer_slot import balancer_of, mtadam_of
from lightning_mtadam.callbacks.tags import WEIGHT
from lightning_mtadam.terms import BalancesTerms, clean_names


@dataclass(frozen=True)
class Reading:
    """The balance at one time.

    Attributes:
        prefix: the first part of its tags, which tells several optimizers apart.
        terms: I names.
        layers: L names, of layers that train and that a term reaches.
        table: the balance weights, on the host: [L, I]; nan where a term does not reach a layer.
        term_weights: what multiplies each loss, by term; empty where that differs by layer.
    """

    prefix: str
    terms: tuple[str, ...]
    layers: tuple[str, ...]
    table: Tensor
    term_weights: dict[str, float]

    @classmethod
    def of(cls, prefix: str, source: BalancesTerms, parameters: Iterable[tuple[str, Tensor]]) -> Reading:
        """Read what balances; ``parameters``, by name, say which layers train."""
        weights = source.balance_weights()
        rows = list(weights.values()) or [torch.empty(len(source.terms), device="cpu")]
        table = torch.stack(rows)[: len(weights)].detach().cpu()  # in one go: the host waits for an accelerator once
        frozen, unreached = frozen_layers(weights, parameters), table.isnan().all(1).tolist()
        kept = {name: at for at, name in enumerate(weights) if name not in frozen and not unreached[at]}
        term_weights = {term: float(weight) for term, weight in source.term_weights().items()}
        return cls(prefix, tuple(source.terms), tuple(kept), table[list(kept.values())], term_weights)


def readings(trainer: pl.Trainer) -> list[Reading]:
    """The balance of everything that balances losses in a trainer."""
    parameters = list(trainer.lightning_module.named_parameters())
    return [Reading.of(prefix, source, parameters) for prefix, source in named_sources(trainer)]


def named_sources(trainer: pl.Trainer) -> Iterator[tuple[str, BalancesTerms]]:
    """What balances losses in a trainer, each with the first part of its tags."""
    balancer = balancer_of(trainer.lightning_module)
    if balancer is not None:
        yield WEIGHT, balancer
        return
    yield from named_optimizers(trainer.optimizers)


def named_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[str, BalancesTerms]]:
    """The MTAdams of a trainer, each with the first part of its tags."""
    held = [mtadam_of(optimizer) or optimizer for optimizer in optimizers]
    found = [optimizer for optimizer in held if isinstance(optimizer, BalancesTerms)]
    for index, optimizer in enumerate(found):
        name = type(optimizer).__name__ + (f"-{index}" if index else "")
        yield WEIGHT if len(found) == 1 else f"{WEIGHT}-{name}", optimizer


def frozen_layers(layers: Iterable[str], parameters: Iterable[tuple[str, Tensor]]) -> set[str]:
    """The layers that are a parameter or a module by name, and of which nothing is trained.

    Example:
        >>> named = [("trunk.weight", torch.ones(1)), ("head.weight", torch.ones(1, requires_grad=True))]
        >>> frozen_layers(["trunk", "head.weight", "global"], named)
        {'trunk'}
    """
    parameters = list(parameters)
    owners: dict[bool, set[str]] = {True: set(), False: set()}
    for name, (_, parameter) in zip(clean_names([name for name, _ in parameters]), parameters, strict=True):
        while name:
            owners[parameter.requires_grad].add(name)
            name = name.rpartition(".")[0]
    return set(layers) & owners[False] - owners[True]
