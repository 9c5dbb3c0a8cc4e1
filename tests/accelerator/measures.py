"""What is counted on an accelerator: waits of the host, kernels, memory. Each function gives rows of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from example_projects.pix2pix.networks import UNet
from lightning_mtadam import MTAdam
from tests.accelerator.device import NAME, Watch, native
from tests.accelerator.linear import losses_of, step
from tests.accelerator.networks import gpt2_shapes, resnet18

SETTLED = 26
"""Steps after which nothing is new, with ``balance_every`` and ``low_memory`` too."""

Shapes = Sequence[tuple[int, ...]]


class Row(NamedTuple):
    """A line of the table; ``passed`` is ``None`` where nothing is demanded."""

    section: str
    case: str
    found: str
    passed: bool | None = None


def tensors(quick: bool) -> Mapping[str, Shapes]:
    """The networks that are measured, by the shapes of their parameters."""
    residual = [tuple(parameter.shape) for parameter in resnet18().parameters()]
    if quick:
        return {"ResNet-18": residual}
    with torch.device("meta"):
        unet = [tuple(parameter.shape) for parameter in UNet().parameters()]
    return {"ResNet-18": residual, "U-Net": unet, "GPT-2": gpt2_shapes()}


def parameters_of(shapes: Shapes, device: str) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.full(shape, 0.1, device=device)) for shape in shapes])


def settled(shapes: Shapes, device: str, terms: int, **options: Any) -> tuple[nn.ParameterList, MTAdam]:
    """Parameters and their optimizer, after some steps."""
    parameters = parameters_of(shapes, device)
    optimizer = MTAdam(parameters.named_parameters(), **options)
    for _ in range(SETTLED if options else 4):
        step(optimizer, losses_of(parameters, terms))
    return parameters, optimizer


def synchronize(device: str) -> None:
    torch.get_device_module(device).synchronize()


# Waits of the host

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"denominator": "own"},
    {"denominator": "mean"},
    {"denominator": "sum"},
    {"amsgrad": True},
    {"layers": "module"},
    {"anchor": "mean"},
    {"weight_decay": 0.1},
    {"eps": 0.0},
    {"on_nonfinite": "skip"},
    {"balance_every": 2},
    {"balance_every": 1000},
    {"low_memory": True},
)


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """Raise where the host would wait for anything but an event."""
    if device == NAME:
        with Watch("item", "d2h", "h2d", "kernel"):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(device: str, quick: bool) -> Iterator[Row]:
    """Steady steps within ``set_sync_debug_mode("error")``."""
    for options in OPTIONS[:3] if quick else OPTIONS:
        parameters, optimizer = settled([(30, 20), (20,), (7, 3, 2)], device, 3, **options)
        for _ in range(4):
            losses = losses_of(parameters, 3)
            with without_waiting(device):
                step(optimizer, losses)
        yield Row("waits", f"4 steps, {options or 'default'}", "none", True)


# Kernels


def kernels(device: str, quick: bool) -> Iterator[Row]:
    """Kernels of one step, without those of the gradients."""
    limits = {("ResNet-18", 2): 150, ("ResNet-18", 3): 180, ("ResNet-18", 10): 400, ("GPT-2", 3): 500}
    for name, shapes in tensors(quick).items():
        for terms in (2, 3) if quick else (2, 3, 10):
            parameters, optimizer = settled(shapes, device, terms)
            losses = losses_of(parameters, terms)
            found = launched(device, lambda one=optimizer, of=losses: step(one, of)) - 2 * terms * len(shapes)
            limit = limits.get((name, terms))
            yield Row("kernels", f"{name}, I = {terms}", str(found), None if limit is None else found <= limit)

    shapes = tensors(quick)["ResNet-18"]
    added = 2 * len(shapes)  # autograd adds up what the terms of a sum give to the same parameters
    for case, limit, options in (("light", 110, {"balance_every": 1000}), ("low_memory", 600, {"low_memory": True})):
        parameters, optimizer = settled(shapes, device, 3, **options)
        losses = losses_of(parameters, 3)
        found = launched(device, lambda one=optimizer, of=losses: step(one, of)) - 6 * len(shapes)
        found -= added if case == "light" else 0
        yield Row("kernels", f"ResNet-18, I = 3, {case}", str(found), found <= limit)


def launched(device: str, work: Callable[[], None]) -> int:
    """How many kernels it takes."""
    if device == NAME:
        with Watch() as watch:
            work()
        return watch.launches
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        synchronize(device)
    return sum(event.device_type.name == "CUDA" for event in found.events())


# Memory


def memory(device: str, quick: bool) -> Iterator[Row]:
    """The most that is held from the first step on, in multiples of the parameters; they themselves not counted."""
    for name, shapes in tensors(quick).items():
        for terms, options in ((3, {}), (3, {"low_memory": True})):
            before, reset = held(device), lambda: reset_peak(device)
            if options:
                parameters, optimizer = settled(shapes, device, terms, **options)
                reset()
                step(optimizer, losses_of(parameters, terms))
            else:
                reset()
                parameters, optimizer = settled(shapes, device, terms)
            size = 4 * sum(parameter.numel() for parameter in parameters)
            peak = peak_held(device) - before - size
            limit = ((terms + 3) if options else (2 * terms + 3)) * size + 2**26
            found = f"{peak / size:.2f} |theta|, limit {limit / size:.2f}"
            yield Row("memory", f"{name}, I = {terms}, {options or 'default'}", found, peak <= limit)
            del parameters, optimizer


def held(device: str) -> int:
    return int(native().memory()[0] if device == NAME else torch.cuda.memory_allocated())


def reset_peak(device: str) -> None:
    native().reset() if device == NAME else torch.cuda.reset_peak_memory_stats()


def peak_held(device: str) -> int:
    return int(native().memory()[1] if device == NAME else torch.cuda.max_memory_allocated())
