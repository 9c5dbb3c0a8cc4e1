"""What is timed on a GPU, as ratios to Adam in one process, in turn. Each function gives rows of the table."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtadam import MTAdam
from tests.accelerator.device import NAME
from tests.accelerator.linear import losses_of, step
from tests.accelerator.measures import SETTLED, Row, Shapes, parameters_of, settled, synchronize, tensors
from tests.accelerator.networks import resnet18


def interleaved(device: str, works: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, done in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(3 + repeats):
        for name, work in works.items():
            synchronize(device)
            begin = time.perf_counter()
            work()
            synchronize(device)
            if round_ >= 3:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


class _Prepared:
    """An optimizer's step by itself: its gradients are made before it is timed."""

    def __init__(self, shapes: Shapes, device: str, terms: int, **options: Any) -> None:
        self.parameters, self.optimizer = settled(shapes, device, terms, **options)
        self.terms = terms

    def prepare(self) -> None:
        self.optimizer.zero_grad()
        self.optimizer.backward(losses_of(self.parameters, self.terms))

    def collect(self) -> None:
        self.optimizer.zero_grad()
        self.optimizer.backward(self.losses)

    def fresh_losses(self) -> None:
        self.losses = losses_of(self.parameters, self.terms)

    def bare(self) -> None:
        mine, losses = list(self.parameters), list(self.losses.values())
        for loss in losses:
            torch.autograd.grad(loss, mine)


VARIANTS: Mapping[str, tuple[dict[str, Any], float | None]] = {
    "eager": ({}, 1.3),
    "compile": ({"compile": True}, 0.9),
    "light": ({"balance_every": 1000}, None),
}
"""How a step is taken, and what it may cost: over as many steps of Adam as it has gradients, which are one if light."""


def steps(device: str, quick: bool) -> Iterator[Row]:
    """The time of ``MTAdam.step`` over that of ``torch.optim.Adam(fused=True)``; all gradients are there."""
    names = ["eager", "light"] if device == NAME else list(VARIANTS)
    for network, shapes in tensors(quick).items():
        for terms in (2,) if quick else (2, 3, 10):
            size = 4 * sum(map(math.prod, shapes))
            needed = size * (len(names) * (2 * terms + 4) + 4)
            if device != NAME and needed > 0.9 * torch.cuda.mem_get_info()[0]:
                yield Row("step", f"{network}, I = {terms}", f"needs {needed / 2**30:.0f} GiB: not run")
                continue
            middle = _times_of_steps(shapes, device, terms, names, repeats=3 if quick else 15)
            for name in names:
                limit, gradients = VARIANTS[name][1], 1 if name == "light" else terms
                ratio = middle[name] / gradients / middle["adam"]
                passed = None if limit is None or device == NAME else ratio <= limit
                said = f"{middle[name]:.2f} ms, {ratio:.2f} of {gradients} x Adam's {middle['adam']:.2f} ms"
                yield Row("step", f"{network}, I = {terms}, {name}", said, passed)
            more = middle["collect"] - middle["bare"]
            yield Row(
                "step", f"{network}, I = {terms}, to collect the gradients", f"{more:.2f} ms more than to make them"
            )


def _times_of_steps(shapes: Shapes, device: str, terms: int, names: Sequence[str], repeats: int) -> dict[str, float]:
    """Median milliseconds: of each variant's step, of Adam's, and of making gradients with and without keeping them."""
    mine = {name: _Prepared(shapes, device, terms, **VARIANTS[name][0]) for name in names}
    rival = parameters_of(shapes, device)
    for parameter in rival:
        parameter.grad = torch.full_like(parameter, 0.1)
    adam, eager = torch.optim.Adam(rival.parameters(), fused=device != NAME), mine["eager"]
    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        **{name: (one.prepare, one.optimizer.step) for name, one in mine.items()},
        "adam": (eager.fresh_losses, adam.step),
        "collect": (eager.fresh_losses, eager.collect),
        "bare": (eager.fresh_losses, eager.bare),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(2 + repeats):
        for name, (prepare, work) in works.items():
            prepare()
            found = timed(device, work)
            if round_ >= 2:
                times[name].append(found)
    return {name: statistics.median(found) for name, found in times.items()}


def timed(device: str, work: Callable[[], object]) -> float:
    """Milliseconds."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return 1e3 * (time.perf_counter() - begin)


def whole_steps(device: str, quick: bool) -> Iterator[Row]:
    """Forward, backward and step of ResNet-18 on a batch, over Adam(fused=True) on the sum of three losses."""
    batch, pixels = (2, 32) if quick else (64, 128)
    images, labels = torch.randn(batch, 3, pixels, pixels, device=device), torch.arange(batch, device=device) % 10

    def losses(network: nn.Module) -> dict[str, Tensor]:
        output = network(images)
        classes = nn.functional.cross_entropy(output, labels)
        return {"class": classes, "size": output.square().mean(), "sum": output.sum(1).abs().mean()}

    def of_adam() -> Callable[[], None]:
        network = resnet18().to(device)
        adam = torch.optim.Adam(network.parameters(), fused=device != NAME)

        def run() -> None:
            adam.zero_grad()
            torch.stack(list(losses(network).values())).sum().backward()
            adam.step()

        return run

    def of_mtadam(**options: Any) -> Callable[[], None]:
        network = resnet18().to(device)
        optimizer = MTAdam(network.named_parameters(), **options)

        def run() -> None:
            step(optimizer, losses(network))

        for _ in range(SETTLED if options else 3):
            run()
        return run

    works = {"adam": of_adam(), "eager": of_mtadam(), "balance_every=50": of_mtadam(balance_every=50)}
    if device != NAME:
        works["compile"] = of_mtadam(compile=True)
    middle = interleaved(device, works, 2 if quick else 30)
    for name in list(works)[1:]:
        ratio = middle[name] / middle["adam"]
        passed = ratio <= 1.1 if name == "balance_every=50" and device != NAME else None
        yield Row("whole step", f"ResNet-18, I = 3, {name}", f"{middle[name]:.2f} ms, {ratio:.2f} of Adam", passed)
