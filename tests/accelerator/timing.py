"""What is timed on a GPU, as ratios to Adam in one process, in turn. Each function gives rows of the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
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


def steps(device: str, quick: bool) -> Iterator[Row]:
    """The time of ``MTAdam.step`` over I steps of ``torch.optim.Adam(fused=True)``, whose gradients are there."""
    variants: dict[str, dict[str, Any]] = {"eager": {}}
    if device != NAME:
        variants["compile"] = {"compile": True}
    limits = {"eager": 1.3, "compile": 0.9}
    for name, shapes in tensors(quick).items():
        for terms in (2,) if quick else (2, 3, 10):
            mine = {variant: _Prepared(shapes, device, terms, **options) for variant, options in variants.items()}
            rival = parameters_of(shapes, device)
            adam = torch.optim.Adam(rival.parameters(), fused=device != NAME)
            for parameter in rival:
                parameter.grad = torch.full_like(parameter, 0.1)
            times: dict[str, list[float]] = {variant: [] for variant in (*mine, "adam", "collect", "bare")}
            for round_ in range(3 if quick else 18):
                for variant, one in mine.items():
                    one.prepare()
                    found = timed(device, one.optimizer.step)
                    if round_ >= 2:
                        times[variant].append(found)
                one = mine["eager"]
                for variant, work in (("adam", adam.step), ("collect", one.collect), ("bare", one.bare)):
                    one.fresh_losses()
                    found = timed(device, work)
                    if round_ >= 2:
                        times[variant].append(found)
                one.optimizer.zero_grad()
            middle = {variant: statistics.median(found) for variant, found in times.items()}
            collecting = middle["collect"] - middle["bare"]
            for variant in mine:
                ratio = middle[variant] / terms / middle["adam"]
                said = f"{ratio:.2f} of I times Adam's {middle['adam']:.2f} ms; collecting takes {collecting:.2f} ms"
                passed = None if device == NAME else ratio <= limits[variant]
                yield Row("step", f"{name}, I = {terms}, {variant}", said, passed)


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
