"""One training, which runs on any device alike: what is compared between the host and an accelerator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtadam import MTAdam
from tests.accelerator.device import NAME

DEVICE = os.environ.get("LIGHTNING_MTADAM_DEVICE", NAME)
"""What the tests run on: the stand-in, or a device that is there, as ``tests.accelerator.on_gpu`` asks for."""

FIRST, SECOND = f"{DEVICE}:0", f"{DEVICE}:1"

SHAPES = ((4, 3), (4,), (), (0, 2), (300, 9), (2, 3, 4, 2), (700,))
TERMS = ("a", "b", "c")
SCALES = (1.0, 30.0, 0.02)


def network(device: str, dtype: torch.dtype = torch.float64) -> nn.ParameterList:
    """Small and large parameters, empty and scalar ones, and one in channels_last."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    parameters[5] = parameters[5].to(memory_format=torch.channels_last)
    return nn.ParameterList([nn.Parameter(parameter.to(device)) for parameter in parameters])


def losses_of(step: int, parameters: nn.ParameterList) -> dict[str, Tensor]:
    """Losses whose gradients are drawn by step: "b" misses two parameters, "c" comes late and stays away at times."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for index, (term, scale) in enumerate(zip(TERMS, SCALES, strict=True)):
        total: Any = 0.0
        for place, parameter in enumerate(parameters):
            direction = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if not (term == "b" and place in (1, 4)):
                total = total + (parameter * direction.to(parameter)).sum() + 0.1 * index * parameter.square().sum()
        if not (term == "c" and (step < 2 or 5 <= step < 7)):
            found[term] = total
    return found


def groups_of(parameters: nn.ParameterList, **second: Any) -> list[dict[str, Any]]:
    """Two groups with numbers of their own."""
    named = [(f"layer{index // 2}.p{index}", parameter) for index, parameter in enumerate(parameters)]
    return [{"params": named[:5]}, {"params": named[5:], "lr": 3e-3, "betas": (0.8, 0.99, 0.7), **second}]


Road = Callable[[MTAdam, nn.ParameterList, int], None]


def plain(optimizer: MTAdam, parameters: nn.ParameterList, step: int) -> None:
    optimizer.backward(losses_of(step, parameters))


def accumulated(optimizer: MTAdam, parameters: nn.ParameterList, step: int) -> None:
    for part in (0, 50):
        half = torch.tensor(0.5, dtype=parameters[0].dtype, device=parameters[0].device)
        optimizer.backward(losses_of(step + part, parameters), grad_output=half)


def scaled(optimizer: MTAdam, parameters: nn.ParameterList, step: int) -> None:
    scale = torch.tensor(1024.0, device=parameters[0].device)
    optimizer.backward(losses_of(step, parameters), grad_output=scale.to(parameters[0].dtype), loss_scale=scale)


def clipped_by_norm(optimizer: MTAdam, parameters: nn.ParameterList, step: int) -> None:
    plain(optimizer, parameters, step)
    optimizer.clip_gradients(0.7)


def clipped_by_value(optimizer: MTAdam, parameters: nn.ParameterList, step: int) -> None:
    plain(optimizer, parameters, step)
    optimizer.clip_gradients(0.01, "value")


ROADS: Mapping[str, Road] = {
    "plain": plain,
    "accumulated": accumulated,
    "scaled": scaled,
    "clipped by norm": clipped_by_norm,
    "clipped by value": clipped_by_value,
}


def make(device: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.ParameterList, MTAdam]:
    """The parameters, and an optimizer for them, which knows all terms."""
    parameters = network(device, dtype)
    return parameters, MTAdam(groups_of(parameters), lr=1e-2, terms=TERMS, **options)


def run(optimizer: MTAdam, parameters: nn.ParameterList, steps: range, road: Road = plain) -> None:
    """Train for these steps."""
    for step in steps:
        optimizer.zero_grad()
        road(optimizer, parameters, step)
        optimizer.step()


def numbers_in(optimizer: MTAdam) -> Iterator[tuple[str, Tensor]]:
    """All that a training leaves: parameters, states, and what is said of the balance."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        yield f"parameter {index}", parameter.detach()
        for key, value in optimizer.state[parameter].items():
            yield f"{key} of {index}", value
    for name, read in (("weight", optimizer.balance_weights), ("scale", optimizer.scales)):
        for layer, value in read().items():
            yield f"{name} of {layer}", value
    for term, value in optimizer.average_weights().items():
        yield f"average weight of {term}", value


def assert_same(optimizer: MTAdam, expected: MTAdam, *, tolerance: float = 1e-12) -> None:
    """All numbers are the same, whatever devices they are on."""
    for (name, mine), (_, theirs) in zip(numbers_in(optimizer), numbers_in(expected), strict=True):
        close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        torch.testing.assert_close(mine.cpu(), theirs.cpu(), msg=lambda text, of=name: f"{of}: {text}", **close)
