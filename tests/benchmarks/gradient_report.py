"""What ``GradientReport`` costs: ``python -m tests.benchmarks.gradient_report``. A U-Net, under the trainer.

1. A step with a report over the steps beside it, which have none; and what that adds to a step, where one in 50 has a
   report, and one report in 10 has pictures. The step is whole, with the part of TensorBoard's logger.
2. The time that the callback's hooks take in a step without a report, in ms.

Run by hand: timings are no tests.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_mtadam import MTAdam
from lightning_mtadam.callbacks import GradientReport
from tests.benchmarks.measuring import Ratio, parse, parser, ratio, show, thread_counts, versions
from tests.benchmarks.networks import Task, mnist_task, unet_task
from tests.benchmarks.step_cost import Trained

CASES: dict[str, Callable[[], Task]] = {
    "MNIST, I = 10": mnist_task,
    "U-Net, I = 2": partial(unet_task, 2, width=16),  # a small batch, beside which a report weighs most
    "U-Net, I = 6": partial(unet_task, 6, width=16),
}
EVERY, DRAWN = 50, 10  # steps from one report to the next, reports from one with pictures to the next
WARM_UP = 4  # steps; an even number
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"MTAdam": MTAdam, "Adam": Adam}


class TimedReport(GradientReport):
    """Reports every second step, and notes how long its hooks take in each."""

    def __init__(self, *, pictures: bool) -> None:
        super().__init__(every_n_steps=2, image_every_n=int(pictures))
        self.seconds: list[float] = []

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Add the time of what is done within to that of the step."""
        start = time.perf_counter()
        yield
        self.seconds[-1] += time.perf_counter() - start

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.seconds.append(0.0)

    def on_before_backward(self, *args: Any, **kwargs: Any) -> None:
        """As of every report."""
        with self.timing():
            super().on_before_backward(*args, **kwargs)

    def on_before_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As of every report."""
        with self.timing():
            super().on_before_optimizer_step(*args, **kwargs)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """As of every report."""
        with self.timing():
            super().on_train_batch_end(*args, **kwargs)


class Steps(pl.Callback):
    """Times whole steps, from the beginning of one to that of the next."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.begins.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """How long each step took; the last one is not known."""
        return [after - before for before, after in zip(self.begins, self.begins[1:], strict=False)]


def measure(
    case: str, make_optimizer: Callable[..., Optimizer], repeats: int, *, pictures: bool
) -> tuple[Ratio, float, float]:
    """A step with a report over one without; the median and the largest time of the hooks without, in ms."""
    task, steps, report = CASES[case](), Steps(), TimedReport(pictures=pictures)
    batches = WARM_UP + 2 * repeats + 1
    data = [part.repeat(batches, *[1] * (part.dim() - 1)) for part in task.batch]
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            callbacks=[steps, report],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(Trained(task, make_optimizer), DataLoader(TensorDataset(*data), len(task.batch[0])))
    seconds, idle = steps.seconds[WARM_UP:], report.seconds[WARM_UP + 1 :: 2]
    return ratio(seconds[::2], seconds[1::2]), 1e3 * statistics.median(idle), 1e3 * max(idle)


def row(case: str, name: str, repeats: int) -> dict[str, object]:
    """A line of the table."""
    drawn, _, _ = measure(case, OPTIMIZERS[name], repeats, pictures=True)
    found, idle, most = measure(case, OPTIMIZERS[name], repeats, pictures=False)
    mean = found.value + (drawn.value - found.value) / DRAWN
    return {
        "case": case,
        "optimizer": name,
        "a step with a report / one without": found,
        "with its pictures": drawn,
        f"added, one report in {EVERY} steps": f"{100 * (mean - 1) / EVERY:.2f} %",
        "hooks of other steps, ms": f"{idle:.3f}, at most {most:.3f}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parser(__doc__, repeats=15)
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    chosen = parse(options, arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print(versions())
    for threads in thread_counts(chosen):
        rows = [row(case, name, chosen.repeats) for case in chosen.cases for name in OPTIMIZERS]
        show(f"{threads} thread(s), n = {chosen.repeats}; in brackets the quartiles of the paired ratios", rows)


if __name__ == "__main__":
    main()
