"""What a step costs: ``python -m tests.benchmarks.step_cost``. Ratios of medians, interleaved in one process.

1. A training step through Lightning (module, logging, a CSV logger, monitor), over the bare
   ``forward + I torch.autograd.grad calls``.
2. The plain sum with Adam through the same module, over the bare ``forward + backward``: what Lightning itself costs.
3. As 1, in two processes under ``strategy="ddp"``, of one thread each. Communication is excluded: collectives return at
   once. What belongs to it (copies, divisions, announcements) is not.

Run by hand: timings are no tests.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_mtadam import MTAdam, MultiTermLightningModule
from lightning_mtadam.callbacks import BalanceWeightMonitor
from tests.benchmarks.measuring import WARM_UP, Ratio, Work, parse, parser, ratio, show, thread_counts, versions
from tests.benchmarks.networks import Batch, Losses, Task, mnist_task, unet_task
from tests.distributed.ranks import results, run_ranks

SMALL_UNET = {"width": 16, "batch": 16}
CASES: dict[str, Callable[[], Task]] = {
    "MNIST, I = 10": mnist_task,
    "U-Net, I = 2": partial(unet_task, 2, **SMALL_UNET),
    "U-Net, I = 6": partial(unet_task, 6, **SMALL_UNET),
}
RANKS = 2


class Trained(MultiTermLightningModule):
    """Trains on a task with a given optimizer."""

    def __init__(self, task: Task, make_optimizer: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.task, self.network, self.make_optimizer = task, task.network, make_optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Losses:
        """Return the terms."""
        return self.task.losses(batch)

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer."""
        return self.make_optimizer(self.network.named_parameters())


class Interleave(pl.Callback):
    """Times the trainer's iterations, whole, and between them another piece of work."""

    def __init__(self, other: Work) -> None:
        self.other = other
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.mark: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object, **kwargs: object) -> None:
        """End of one iteration, beginning of the next."""
        now = time.perf_counter()
        if self.mark is not None:
            self.ours.append(now - self.mark)
        trainer.strategy.barrier()
        start = time.perf_counter()
        self.other()
        self.theirs.append(time.perf_counter() - start)
        trainer.strategy.barrier()
        self.mark = time.perf_counter()

    def ratio(self) -> Ratio:
        """An iteration over the other work."""
        return ratio(self.ours[WARM_UP:], self.theirs[WARM_UP : len(self.ours)])


def per_term(task: Task) -> None:
    """Forward, and a backward pass per term."""
    parameters, losses = task.parameters, list(task.losses().values())
    for index, loss in enumerate(losses):
        torch.autograd.grad(loss, parameters, retain_graph=index < len(losses) - 1)


def one_sum(task: Task) -> None:
    """Forward, and one backward pass."""
    torch.autograd.grad(torch.stack(list(task.losses().values())).sum(), task.parameters)


def step_ratio(
    bare: Callable[[Task], None], make_optimizer: Callable[..., Optimizer], case: str, repeats: int
) -> Ratio:
    """A step through Lightning over a bare one, in this process or in the ranks that it belongs to."""
    timing = Interleave(partial(bare, CASES[case]()))
    task = CASES[case]()
    batches = WARM_UP + repeats + 1
    data, target = (part.repeat(batches, *[1] * (part.dim() - 1)) for part in task.batch)
    several = dist.is_initialized()
    monitor = [BalanceWeightMonitor()] if bare is per_term else []
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=RANKS if several else 1,
            strategy=DDPStrategy(process_group_backend="gloo") if several else "auto",
            use_distributed_sampler=False,
            logger=CSVLogger(folder),
            callbacks=[timing, *monitor],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(Trained(task, make_optimizer), DataLoader(TensorDataset(data, target), len(task.batch[0])))
    return timing.ratio()


class Done:
    """What a collective returns that need not be waited for."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def is_completed(self) -> bool:
        """Always."""
        return True


def reduced_at_once(tensor: Tensor, *args: object, **kwargs: object) -> Done:
    """Stands in for ``dist.all_reduce``: the others' gradients are zero."""
    return Done()


def gathered_at_once(found: Sequence[Tensor], tensor: Tensor, *args: object, **kwargs: object) -> Done:
    """Stands in for ``dist.all_gather``: the others say the same."""
    for one in found:
        one.copy_(tensor)
    return Done()


def train_rank(rank: int, make_optimizer: Callable[..., Optimizer], case: str, repeats: int) -> Ratio:
    """One rank's part of 3."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.distributed.all_reduce", reduced_at_once))
        stack.enter_context(mock.patch("torch.distributed.all_gather", gathered_at_once))
        return step_ratio(per_term, make_optimizer, case, repeats)


def in_ranks(make_optimizer: Callable[..., Optimizer], case: str, repeats: int) -> Ratio:
    """Ratio 3, of the slower rank."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_ranks(train_rank, Path(folder), make_optimizer, case, repeats, ranks=RANKS, timeout=1800)
    return max(results(outcomes), key=lambda found: found.value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parser(__doc__, repeats=30)
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--compile", action="store_true", help="MTAdam(compile=True)")
    options.add_argument("--no-ranks", action="store_true", help="without 3")
    chosen = parse(options, arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print(versions())
    make_optimizer = partial(MTAdam, compile=True) if chosen.compile else MTAdam
    note = f"n = {chosen.repeats}; in brackets the quartiles of the paired ratios"
    if not chosen.no_ranks:  # before this process has threads, which a fork would not have
        found = {case: in_ranks(make_optimizer, case, chosen.repeats) for case in chosen.cases}
        ranked = [{"case": case, "3. step under DDP / bare": one} for case, one in found.items()]
        show(f"{RANKS} ranks of one thread, the slower one, {note}", ranked)
    for threads in thread_counts(chosen):
        rows = [
            {
                "case": case,
                "1. step through Lightning / bare": step_ratio(per_term, make_optimizer, case, chosen.repeats),
                "2. Adam through Lightning / bare": step_ratio(one_sum, Adam, case, chosen.repeats),
            }
            for case in chosen.cases
        ]
        show(f"{threads} thread(s), {note}", rows)


if __name__ == "__main__":
    main()
