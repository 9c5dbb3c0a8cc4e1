"""What ``BalanceWeightMonitor`` costs: ``python -m tests.benchmarks.monitor``. Medians and quartiles.

One run with a TensorBoard logger, of which every second step is logged, and every fourth of these draws the pictures.
The time is the processor's in the monitor's own hook, in milliseconds: in a step that is not logged, in one that is,
and in one with pictures.

Run by hand: timings are no tests.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_mtadam import MTAdam
from lightning_mtadam.callbacks import BalanceWeightMonitor
from tests.benchmarks.measuring import parse, parser, show, versions
from tests.benchmarks.networks import Task, mnist_task, resnet_task
from tests.benchmarks.step_cost import Trained

CASES: dict[str, Callable[[], Task]] = {
    "MNIST, 8 layers, I = 10": partial(mnist_task, batch=2),
    "ResNet-18, 62 layers, I = 3": partial(resnet_task, batch=2, pixels=16),
}
EVERY, PICTURES = 2, 4
KINDS = ("not logged", "logged", "with pictures")


class Timed(BalanceWeightMonitor):
    """Times its own hook, by what it did."""

    def __init__(self) -> None:
        super().__init__(image_every_n=PICTURES)
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """As of the monitor."""
        before = self._logged
        start = time.process_time()
        super().on_train_batch_end(trainer, *args, **kwargs)
        seconds = time.process_time() - start
        kind = KINDS[0] if self._logged == before else KINDS[1 + (before % PICTURES == 0)]
        self.seconds[kind].append(seconds)


def measure(make_task: Callable[[], Task], repeats: int) -> dict[str, str]:
    """The times of each kind of step, so many of those with pictures."""
    task, monitor = make_task(), Timed()
    steps = EVERY * PICTURES * (repeats + 1)
    data, target = (part.repeat(steps, *[1] * (part.dim() - 1)) for part in task.batch)
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            log_every_n_steps=EVERY,
            callbacks=[monitor],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(Trained(task, MTAdam), DataLoader(TensorDataset(data, target), len(task.batch[0])))
    return {kind: quartiles(seconds[1:]) for kind, seconds in monitor.seconds.items()}  # the first opens the files


def quartiles(seconds: Sequence[float]) -> str:
    """The median in milliseconds, and the quartiles."""
    low, middle, high = (1e3 * one for one in statistics.quantiles(seconds, n=4))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    chosen = parse(parser(__doc__, repeats=30), arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print(versions())
    rows = [{"case": case, **measure(make_task, chosen.repeats)} for case, make_task in CASES.items()]
    show(f"processor milliseconds of the monitor, n = {chosen.repeats} with pictures; in brackets the quartiles", rows)


if __name__ == "__main__":
    main()
