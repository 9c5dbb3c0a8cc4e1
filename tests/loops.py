"""Loops as a user writes them without Lightning; the trainer is held to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtadam import MTAdam
from tests.lightning_models import (
    Batch,
    discriminator_losses,
    generator_losses,
    make_gan_parts,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
    total,
)


def parameters_in(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def backward(optimizer: torch.optim.Optimizer, losses: Mapping[str, Tensor], *, accumulate: int = 1) -> None:
    """Differentiate what one batch gives to a step of ``accumulate``: its terms for MTAdam, else their sum."""
    if isinstance(optimizer, MTAdam):
        optimizer.backward({name: loss / accumulate for name, loss in losses.items()})
    else:
        own = [parameter for parameter in parameters_in(optimizer) if parameter.requires_grad]
        (total(losses) / accumulate).backward(inputs=own)


def clip_by_hand(optimizer: torch.optim.Optimizer, limit: float, algorithm: str) -> None:
    if isinstance(optimizer, MTAdam):
        optimizer.clip_gradients(limit, algorithm)
    elif algorithm == "norm":
        torch.nn.utils.clip_grad_norm_(parameters_in(optimizer), limit)
    else:
        torch.nn.utils.clip_grad_value_(parameters_in(optimizer), limit)


def take_step(
    optimizer: torch.optim.Optimizer, losses: Mapping[str, Tensor], *, clip: tuple[float, str] | None = None
) -> None:
    """One step on these losses, clipped to a limit by "norm" or "value"."""
    optimizer.zero_grad()
    backward(optimizer, losses)
    if clip is not None:
        clip_by_hand(optimizer, *clip)
    optimizer.step()


def train(
    optimizer: torch.optim.Optimizer, losses: Iterable[Mapping[str, Tensor]], *, clip: tuple[float, str] | None = None
) -> None:
    """A step on each of the losses; a generator makes them from the parameters that the steps before have left."""
    for found in losses:
        take_step(optimizer, found, clip=clip)


def hand_loop(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    epochs: int = 2,
    accumulate: int = 1,
    clip: tuple[float, str] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    interval: str = "step",
    losses: Callable[[nn.Module, Batch], dict[str, Tensor]] = three_losses,
) -> list[dict[str, float]]:
    """The loop that the trainer is held to: no Lightning; MTAdam by its terms, others by the plain sum.

    A last incomplete group of accumulated batches is divided by ``accumulate`` too, and stepped on.

    Returns:
        The values of the losses at every batch.
    """
    batches, seen = list(batches), []
    for _ in range(epochs):
        for index, batch in enumerate(batches):
            found = losses(network, batch)
            seen.append({name: loss.item() for name, loss in found.items()})
            if index % accumulate == 0:
                optimizer.zero_grad()
            backward(optimizer, found, accumulate=accumulate)
            if (index + 1) % accumulate and index + 1 < len(batches):
                continue
            if clip is not None:
                clip_by_hand(optimizer, *clip)
            optimizer.step()
            if scheduler is not None and interval == "step":
                scheduler.step()
        if scheduler is not None and interval == "epoch":
            scheduler.step()
    return seen


def by_hand(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = make_mtadam,
    make_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    batches: Iterable[Batch] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """The network and optimizer that the hand-written loop arrives at; options are those of ``hand_loop``."""
    network = make_network(dtype)
    optimizer = make_optimizer(network)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    hand_loop(network, optimizer, make_loader() if batches is None else batches, scheduler=scheduler, **options)
    return network, optimizer


def gan_by_hand(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = make_mtadam,
    clip: tuple[float, str] | None = None,
    batches: Iterable[Batch] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[nn.Module, nn.Module]:
    """The loop that ``GAN`` is held to; two epochs of ``make_loader`` if no batches are given."""
    networks = make_gan_parts(dtype)
    optimizers = [make_optimizer(network) for network in networks]
    for batch in list(make_loader()) * 2 if batches is None else batches:
        for optimizer, losses in zip(optimizers, (generator_losses, discriminator_losses), strict=True):
            take_step(optimizer, losses(*networks, batch), clip=clip)
    return networks
