"""Ten class terms of the MNIST network: ``python -m tests.benchmarks.partition``. Ratios of medians, interleaved.

A step is ``zero_grad``, forward, backward and the optimizer's ``step``, without Lightning.

1. The step with ten backward passes over the batch, over that with ``partitioned_losses``.
2. The step with ``partitioned_losses``, over plain ``torch.optim.Adam(fused=True)`` on the mean loss.
3. Of that, the forward and backward passes, over Adam's.
4. Of that, ``MTAdam.step``, over Adam's whole step. What is left is the sum of the gradients.
5. ``MTAdam.step`` over ``Adam.step``.
6. Forward and backward passes in the other way, over those with ``partitioned_losses``: one forward and one backward
   pass over the whole batch, in which each layer's weight gradient is computed from the rows of each term.

Passes end when the gradients of all terms lie in memory that is kept from step to step, as in the optimizer.

Run by hand: timings are no tests.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from example_projects.mnist.module import CLASSES, TERMS, class_losses
from example_projects.mnist.network import Net
from lightning_mtadam import MTAdam, partition, partitioned_losses
from lightning_mtadam.collect.differentiate import term_gradients
from tests.benchmarks.measuring import ratio

BATCH = 64
WARM_UP = 3


class Run:
    """A network, its parameters, and one batch in which every class has rows."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = Net()
        self.parameters = list(self.network.parameters())
        self.kept = {name: [torch.empty_like(p) for p in self.parameters] for name in TERMS}
        self.images = torch.randn(BATCH, 1, 28, 28)
        self.target = torch.randperm(BATCH) % CLASSES

    def nll(self, images: Tensor, target: Tensor) -> Tensor:
        """One loss per row."""
        return F.nll_loss(self.network(images), target, reduction="none")

    def ten(self) -> dict[str, Tensor]:
        """Terms of one graph."""
        return class_losses(self.network(self.images), self.target, torch.ones(CLASSES))

    def ours(self) -> dict[str, Tensor]:
        """Terms with graphs of their own."""
        return partitioned_losses(self.nll, (self.images, self.target), self.target, TERMS)

    def mean(self) -> Tensor:
        """The plain loss."""
        return self.nll(self.images, self.target).mean()

    def passes(self) -> None:
        """Forward and backward passes of each term over its own rows."""
        for name, gradients in term_gradients(self.ours(), self.parameters):
            torch._foreach_copy_(self.kept[name], gradients)

    def passes_by_rows(self) -> None:
        """One forward and one backward pass, split by rows in each layer."""
        order, counts = partition._in_order(self.target, TERMS)
        with watching(self.network) as calls:
            loss = self.nll(self.images.index_select(0, order), self.target.index_select(0, order)).mean()
        outer = torch.autograd.grad(loss, [output for _, _, output in calls])
        for index, ((layer, inner, _), gradient) in enumerate(zip(calls, outer, strict=True)):
            pieces = zip(TERMS, torch.split(inner, counts), torch.split(gradient, counts), strict=True)
            for name, rows, gradient_rows in pieces:
                weight_gradients(layer, rows, gradient_rows, *self.kept[name][2 * index : 2 * index + 2])


@contextmanager
def watching(network: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Collect every layer that has weights, with its input and output, in the order of the calls."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calls.append((layer, inputs[0].detach(), output))

    hooks = [
        layer.register_forward_hook(note)
        for layer in network.modules()
        if any(True for _ in layer.parameters(recurse=False))
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def weight_gradients(layer: nn.Module, rows: Tensor, gradient: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Fill in the gradients of weight and bias, from rows of a layer's input and of the gradient at its output."""
    if isinstance(layer, nn.Linear):
        torch.mm(gradient.T, rows, out=weight)
        torch.sum(gradient, 0, out=bias)
        return
    assert isinstance(layer, nn.Conv2d)
    _, of_weight, of_bias = torch.ops.aten.convolution_backward(
        gradient, rows, layer.weight, [layer.out_channels], layer.stride, layer.padding, layer.dilation,
        False, [0, 0], layer.groups, [False, True, True],
    )  # fmt: skip
    weight.copy_(of_weight)
    bias.copy_(of_bias)


class Step:
    """A whole step, which keeps the seconds of the optimizer's share."""

    def __init__(self, optimizer: torch.optim.Optimizer, backward: Callable[[], object]) -> None:
        self.optimizer, self.backward = optimizer, backward
        self.updates: list[float] = []

    def __call__(self) -> None:
        """Take the step."""
        self.optimizer.zero_grad()
        self.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.updates.append(time.perf_counter() - start)


def with_mtadam(losses: Callable[[Run], dict[str, Tensor]]) -> Step:
    """MTAdam on ten terms."""
    run = Run()
    optimizer = MTAdam(run.network.named_parameters(), terms=TERMS, anchor="mean")
    return Step(optimizer, lambda: optimizer.backward(losses(run)))


def with_adam() -> Step:
    """Adam on the plain mean."""
    run = Run()
    return Step(torch.optim.Adam(run.parameters, fused=True), lambda: run.mean().backward())


def measure(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + WARM_UP):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: found[WARM_UP:] for name, found in times.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print(f"torch {torch.__version__}, CPU, batch {BATCH}, {CLASSES} terms")
    for threads in options.threads:
        torch.set_num_threads(threads)
        run, ours, adam = Run(), with_mtadam(Run.ours), with_adam()
        work: dict[str, Callable[[], object]] = {
            "ten": with_mtadam(Run.ten),
            "ours": ours,
            "adam": adam,
            "passes": run.passes,
            "adam's passes": lambda run=run: torch.autograd.grad(run.mean(), run.parameters),
            "by rows": run.passes_by_rows,
        }
        seconds = measure(work, options.repeats)
        update, adams = ours.updates[WARM_UP:], adam.updates[WARM_UP:]
        print(f"threads: {threads}")
        print("  1. step with ten backward passes / ours:", ratio(seconds["ten"], seconds["ours"]))
        print("  2. our step / Adam's:", ratio(seconds["ours"], seconds["adam"]))
        print("  3. forward and backward passes / Adam's:", ratio(seconds["passes"], seconds["adam's passes"]))
        print("  4. MTAdam.step / Adam's whole step:", ratio(update, seconds["adam"]))
        print("  5. MTAdam.step / Adam.step:", ratio(update, adams))
        print("  6. passes by rows of one graph / ours:", ratio(seconds["by rows"], seconds["passes"]), flush=True)


if __name__ == "__main__":
    main()
