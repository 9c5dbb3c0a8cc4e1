"""What a step costs: ``python -m tests.benchmarks.step_cost``. Ratios of medians, interleaved in one process.

1. A training step of the MNIST network through Lightning (module, logging, monitor), over the bare
   ``forward + ten torch.autograd.grad calls``.
2. The optimizer's step, over ten steps of ``torch.optim.Adam(fused=True)``, one per term.
3. The plain sum with Adam through the same module, over the bare ``forward + backward``: what Lightning itself costs.

Run by hand: timings are no tests.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from example_projects.mnist.methods import METHODS
from example_projects.mnist.module import ClassTerms, class_losses
from example_projects.mnist.network import Net
from lightning_mtadam import MTAdam
from lightning_mtadam.callbacks import BalanceWeightMonitor

BATCH = 64
CLASSES = 10


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, every class."""
    return torch.randn(BATCH, 1, 28, 28), torch.arange(BATCH) % CLASSES


class Interleave(pl.Callback):
    """Times the trainer's iterations, whole, and between them another piece of work."""

    def __init__(self, other: Callable[[], object], warm_up: int) -> None:
        self.other, self.warm_up = other, warm_up
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.mark: float | None = None

    def on_train_batch_start(self, *args: object, **kwargs: object) -> None:
        """End of one iteration, beginning of the next."""
        now = time.perf_counter()
        if self.mark is not None:
            self.ours.append(now - self.mark)
        start = time.perf_counter()
        self.other()
        self.theirs.append(time.perf_counter() - start)
        self.mark = time.perf_counter()

    def ratio(self) -> str:
        """Median over median, with the spread of the paired ratios."""
        return describe(self.ours[self.warm_up :], self.theirs[self.warm_up :])


def describe(ours: list[float], theirs: list[float]) -> str:
    """The ratio of the medians, and the quartiles of the paired ratios."""
    pairs = sorted(a / b for a, b in zip(ours, theirs))  # noqa: B905
    low, high = pairs[len(pairs) // 4], pairs[3 * len(pairs) // 4]
    return (
        f"{statistics.median(ours) / statistics.median(theirs):.3f} (quartiles {low:.3f} to {high:.3f}, n={len(pairs)})"
    )


def lightning_over_bare(method: str, repeats: int) -> str:
    """Ratio 1 with "mtadam", ratio 3 with "adam"."""
    bare, weights = Net(), torch.ones(CLASSES)
    parameters = list(bare.parameters())
    images, target = batch()

    def per_term() -> None:
        losses = list(class_losses(bare(images), target, weights).values())
        for index, loss in enumerate(losses):
            torch.autograd.grad(loss, parameters, retain_graph=index < len(losses) - 1)

    def one_sum() -> None:
        torch.autograd.grad(sum(class_losses(bare(images), target, weights).values()), parameters)

    warm_up = 3
    timing = Interleave(per_term if method == "mtadam" else one_sum, warm_up)
    data = DataLoader(TensorDataset(images.repeat(repeats + warm_up, 1, 1, 1), target.repeat(repeats + warm_up)), BATCH)
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=CSVLogger(folder),
            callbacks=[timing, *([BalanceWeightMonitor()] if method == "mtadam" else [])],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(ClassTerms(METHODS[method], weights, 1e-3), data)
    return timing.ratio()


def optimizer_over_adam(repeats: int) -> str:
    """Ratio 2."""
    ours, theirs = Net(), Net()
    mtadam, adam = MTAdam(ours.named_parameters()), torch.optim.Adam(theirs.parameters(), fused=True)
    images, target = batch()
    for parameter in theirs.parameters():
        parameter.grad = torch.randn_like(parameter)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 3):
        mtadam.zero_grad()
        mtadam.backward(class_losses(ours(images), target, torch.ones(CLASSES)))
        start = time.perf_counter()
        mtadam.step()
        middle = time.perf_counter()
        for _ in range(CLASSES):
            adam.step()
        times[0].append(middle - start)
        times[1].append(time.perf_counter() - middle)
    return describe(times[0][3:], times[1][3:])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print(f"torch {torch.__version__}, lightning {pl.__version__}, Python {platform.python_version()}, CPU")
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"threads: {threads}")
        print("  1. step through Lightning / bare:  ", lightning_over_bare("mtadam", options.repeats))
        print("  2. optimizer step / 10 x fused Adam:", optimizer_over_adam(options.repeats))
        print("  3. Adam through Lightning / bare:  ", lightning_over_bare("adam", options.repeats))


if __name__ == "__main__":
    main()
