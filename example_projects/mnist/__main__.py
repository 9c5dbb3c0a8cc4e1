"""Train MNIST on ten weighted class losses with several methods, and print a table.

The network is the one of the PyTorch MNIST example. Each class has a loss of its own, multiplied by a weight: 1 for
class 0 and U(0, 1000) for the others, unless --weights says otherwise. "balanced-adam" sees weights of 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only

from example_projects.common import report, values
from example_projects.common.command import (
    add_time_limit,
    goes_on,
    keep_quiet,
    run_command,
    write_tables,
)
from example_projects.common.runs import Result, run
from example_projects.mnist.data import MNISTData, find_data
from example_projects.mnist.methods import IN_THE_PAPER, METHODS
from example_projects.mnist.module import CLASSES, ClassTerms
from lightning_mtadam import MTAdam
from lightning_mtadam.callbacks import BalanceWeightMonitor

SETTINGS = ("batch_size", "max_epochs", "limit_train_batches", "dropout2d")
OF_THE_PAPER = ("code", "paper")  # class weights beside which its figures may stand
COLUMNS = ("test_accuracy", "worst_class", "seconds_per_step")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m example_projects.mnist", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--method", nargs="+", action=values.Distinct, choices=METHODS, default=["mtadam", "adam", "balanced-adam"],
        metavar="METHOD", help="one or several of: " + ", ".join(METHODS))  # fmt: skip
    add("--seeds", nargs="+", action=values.Distinct, type=values.seed, default=[0], help="one run per method and seed")
    add("--weights", choices=("code", "paper", "equal"), default="code",
        help="class weights: 1 and nine U(0, 1000), the authors' code; U(1, 1000), the paper; all 1")  # fmt: skip
    add("--dropout2d", action="store_true",
        help="drop whole channels after the convolutions, as the PyTorch example once did, not pixels")  # fmt: skip
    add("--lr", type=values.rate, default=1e-3, help="learning rate")
    add("--batch-size", type=values.positive, default=64, help="of each process")
    add("--max-epochs", type=values.positive, default=1)
    add("--limit-train-batches", type=values.positive, default=None, help="batches of an epoch; all if left out")
    add("--data-dir", type=Path, default=None,
        help="folder with MNIST's four idx files, gzipped or not; if left out they are downloaded, or, offline, a"
        " subset that ships with the project is used")  # fmt: skip
    add("--output-dir", type=Path, default=Path("runs/mnist"), help="where logs, checkpoints and tables go")
    add("--resume", action="store_true", help="continue an interrupted command: skip the runs that have ended")
    add_time_limit(parser)
    add("--accelerator", default="auto", help="as for Lightning's Trainer")
    add("--devices", type=values.devices, default="auto", help="as for Lightning's Trainer")
    add("--strategy", default="auto", help="as for Lightning's Trainer")
    return parser.parse_args(arguments)


def class_weights(kind: str, seed: int) -> torch.Tensor:
    """The ten weights of a seed."""
    random = np.random.RandomState(seed).rand(CLASSES)
    weights = {"code": 1000 * random, "paper": 1 + 999 * random, "equal": np.ones(CLASSES)}[kind]
    if kind == "code":
        weights[0] = 1
    return torch.tensor(weights, dtype=torch.float32)


def run_one(options: argparse.Namespace, data_dir: Path, name: str, seed: int) -> Result:
    """One method with one seed."""
    method = METHODS[name]
    pl.seed_everything(seed, verbose=False)
    weights = class_weights("equal" if method.balanced else options.weights, seed)
    module = ClassTerms(method, weights, options.lr, whole_channels=options.dropout2d)
    return run(
        options.output_dir / f"{options.weights}-lr{options.lr:g}" / f"{name}-seed{seed}",
        module,
        MNISTData(data_dir, options.batch_size, seed),
        lambda trainer: {
            "test_accuracy": float(trainer.callback_metrics["test/accuracy"]),
            "worst_class": float(trainer.callback_metrics["test/worst_class"]),
        },
        settings={
            "data": str(data_dir),
            "method": str(method),
            **{name: getattr(options, name) for name in SETTINGS},
        },
        resume=goes_on(options),
        stop_at=options.stop_at,
        callbacks=[BalanceWeightMonitor()] if method.optimizer is MTAdam else [],
        log_every_n_steps=10,
        max_epochs=options.max_epochs,
        limit_train_batches=options.limit_train_batches,
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=options.strategy,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    keep_quiet()
    data_dir, where = find_data(options.data_dir)
    say = rank_zero_only(print)
    say(where)
    results = []
    for seed in options.seeds:
        for name in options.method:
            say(f"\n{name}, seed {seed}, weights {options.weights}, lr {options.lr:g}", flush=True)
            results.append({"method": name, "seed": seed, **run_one(options, data_dir, name, seed)})
    write(options, results)


@rank_zero_only
def write(options: argparse.Namespace, results: list[Result]) -> None:
    """Print the table and write it as Markdown and CSV, with the runs it summarises."""
    table = write_tables(options, results, COLUMNS)
    seeds = report.markdown(report.by_seed(results, "method", COLUMNS[0]))
    (options.output_dir / "seeds.md").write_text(seeds + "\n")
    parts = [table, seeds, *([IN_THE_PAPER] if options.weights in OF_THE_PAPER else [])]
    print("\n" + "\n\n".join(parts) + "\n")
    print(f"Written to {options.output_dir}: table.md, seeds.md, table.csv; every run in results.csv.")
    print(f"See the balance with: tensorboard --logdir {options.output_dir}")


if __name__ == "__main__":
    run_command(main)
