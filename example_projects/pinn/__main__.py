"""Solve an equation with a network, its residual and its boundary being two losses, and print a table.

The network sees 64 points of [0, 1] at every step and is compared with the exact solution. "adam" is Adam on the sum
of the two losses, "adam-weight-1000" with the boundary loss weighted by hand.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl

from example_projects.common import report, values
from example_projects.common.command import (
    add_time_limit,
    goes_on,
    keep_quiet,
    run_command,
    write_tables,
)
from example_projects.common.runs import Result, run
from example_projects.pinn.data import Points
from example_projects.pinn.methods import METHODS
from example_projects.pinn.module import Equation
from lightning_mtadam import MTAdam
from lightning_mtadam.callbacks import BalanceWeightMonitor

COLUMNS = ("relative_error", "seconds_per_step")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m example_projects.pinn", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--method", nargs="+", action=values.Distinct, choices=METHODS, default=["mtadam", "adam", "adam-weight-1000"],
        metavar="METHOD", help="one or several of: " + ", ".join(METHODS))  # fmt: skip
    add("--seeds", nargs="+", action=values.Distinct, type=values.seed, default=[0, 1, 2, 3, 4],
        help="one run per method and seed")  # fmt: skip
    add("--boundary-factor", type=float, default=1.0,
        help="what the boundary loss is multiplied by, unknown to the methods")  # fmt: skip
    add("--lr", type=values.rate, default=1e-3, help="learning rate")
    add("--steps", type=values.positive, default=2500)
    add("--output-dir", type=Path, default=Path("runs/pinn"), help="where logs, checkpoints and tables go")
    add("--resume", action="store_true", help="continue an interrupted command: skip the runs that have ended")
    add_time_limit(parser)
    add("--accelerator", default="auto", help="as for Lightning's Trainer")
    return parser.parse_args(arguments)


def run_one(options: argparse.Namespace, name: str, seed: int) -> Result:
    """One method with one seed."""
    method = METHODS[name]
    pl.seed_everything(seed, verbose=False)
    return run(
        options.output_dir / f"factor{options.boundary_factor:g}-lr{options.lr:g}" / f"{name}-seed{seed}",
        Equation(method, options.boundary_factor, options.lr),
        Points(options.steps),
        lambda trainer: {"relative_error": float(trainer.callback_metrics["test/relative_error"])},
        settings={"steps": options.steps},
        resume=goes_on(options),
        stop_at=options.stop_at,
        checkpoint_every=500,
        callbacks=[BalanceWeightMonitor()] if method.optimizer is MTAdam else [],
        log_every_n_steps=50,
        max_epochs=1,
        accelerator=options.accelerator,
        devices=1,
        enable_progress_bar=False,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    keep_quiet()
    results = []
    for seed in options.seeds:
        for name in options.method:
            print(f"{name}, seed {seed}, boundary times {options.boundary_factor:g}, lr {options.lr:g}", flush=True)
            results.append({"method": name, "seed": seed, **run_one(options, name, seed)})
    write(options, results)


def write(options: argparse.Namespace, results: list[Result]) -> None:
    """Print the table and write it as Markdown and CSV, with the runs it summarises."""
    table = write_tables(options, results, COLUMNS, report.median_and_range)
    print(f"\n{table}\n\nMedian (smallest to largest). Written to {options.output_dir}: table.md, table.csv;")
    print(f"every run in results.csv. See the balance with: tensorboard --logdir {options.output_dir}")


if __name__ == "__main__":
    run_command(main)
