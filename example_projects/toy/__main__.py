"""Train a network on regression tasks of very different scales, with several methods, and print a table.

Task i is sigma_i tanh((B + eps_i) x). "oracle" is Adam with the weights 1 / sigma_i^2, "equal" Adam on the sum. Each
method takes the learning rate that does best with the tuning seed, whose functions and data no other run sees.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl

from example_projects.common import report
from example_projects.common.command import keep_quiet, write_rows
from example_projects.common.runs import Result, run
from example_projects.toy.data import SIGMAS, Tasks
from example_projects.toy.figure import draw
from example_projects.toy.methods import METHODS
from example_projects.toy.module import Toy
from lightning_mtadam.callbacks import BalanceWeightMonitor


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m example_projects.toy", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", type=int, choices=SIGMAS, default=2, help="how many tasks")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help="one or several of: " + ", ".join(METHODS))  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run per method and seed")
    add("--lr", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2], help="the learning rates to choose from")
    add("--tuning-seed", type=int, default=100, help="the seed with which they are compared, if they are several")
    add("--steps", type=int, default=3000)
    add("--output-dir", type=Path, default=Path("runs/toy"), help="where logs, checkpoints and tables go")
    add("--resume", action="store_true", help="continue an interrupted command: skip the runs that have ended")
    add("--accelerator", default="auto", help="as for Lightning's Trainer")
    return parser.parse_args(arguments)


def run_one(options: argparse.Namespace, name: str, lr: float, seed: int) -> Result:
    """One method with one learning rate and seed."""
    method, sigmas = METHODS[name], SIGMAS[options.tasks]
    print(f"{name}, {options.tasks} tasks, lr {lr:g}, seed {seed}", flush=True)
    pl.seed_everything(seed, verbose=False)
    every = min(100, options.steps)
    result = run(
        folder_of(options, name, lr, seed),
        Toy(method, sigmas, lr),
        Tasks(sigmas, options.steps, seed),
        lambda trainer: {"normalised_loss": float(trainer.callback_metrics["test/normalised_loss"])},
        settings={"steps": options.steps},
        resume=options.resume,
        checkpoint_every=1000,
        callbacks=[BalanceWeightMonitor(image_every_n=0)] if method.has_weights else [],
        log_every_n_steps=every,
        val_check_interval=every,
        max_epochs=1,
        accelerator=options.accelerator,
        devices=1,
        enable_progress_bar=False,
    )
    return {"method": name, "lr": lr, "seed": seed, **result}


def folder_of(options: argparse.Namespace, name: str, lr: float, seed: int) -> Path:
    """Where a run is kept."""
    folder: Path = options.output_dir / f"lr{lr:g}" / f"{name}-seed{seed}"
    return folder


def choose_rate(options: argparse.Namespace, name: str) -> tuple[float, list[Result]]:
    """The learning rate with the smallest loss, and the runs that tell it."""
    if len(options.lr) == 1:
        return options.lr[0], []
    tried = [run_one(options, name, lr, options.tuning_seed) for lr in options.lr]
    return min(tried, key=lambda result: result["normalised_loss"])["lr"], tried


def margins(results: list[Result]) -> list[dict[str, str]]:
    """By how much each method's loss exceeds that of the method before it, seed by seed."""
    losses: dict[str, list[float]] = {}
    for result in results:
        losses.setdefault(result["method"], []).append(result["normalised_loss"])
    return [
        {
            "step": f"{better} to {worse}",
            "margin": report.mean_and_spread([b - a for a, b in zip(losses[better], losses[worse], strict=True)]),
        }
        for better, worse in pairwise(losses)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    options.output_dir /= f"{options.tasks}-tasks"
    keep_quiet()
    rates, tuning = {}, []
    for name in options.method:
        rates[name], tried = choose_rate(options, name)
        tuning += tried
    results = [run_one(options, name, rates[name], seed) for seed in options.seeds for name in options.method]
    write(options, rates, tuning, results)


def write(options: argparse.Namespace, rates: dict[str, float], tuning: list[Result], results: list[Result]) -> None:
    """Print the table and write it as Markdown and CSV, with the runs it summarises and the figure."""
    summary = report.summarise(results, "method", ("normalised_loss", "seconds_per_step"))
    rows = [{"method": row["method"], "lr": f"{rates[row['method']]:g}", **row} for row in summary]
    table = write_rows(options, rows, results)
    if tuning:
        report.write_csv(options.output_dir / "tuning.csv", tuning)
    runs = {name: [folder_of(options, name, rates[name], seed) for seed in options.seeds] for name in options.method}
    draw(runs, SIGMAS[options.tasks], options.output_dir / "curves.png")
    print(f"\n{table}\n")
    if len(options.method) > 1:
        print(f"{report.markdown(margins(results))}\n")
    print(f"Mean +- standard deviation. Written to {options.output_dir}: table.md, table.csv, curves.png; every run in")
    print("results.csv; those that told the learning rates, if there were several, in tuning.csv.")


if __name__ == "__main__":
    main()
