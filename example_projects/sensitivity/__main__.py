"""Train small problems whose losses are multiplied by factors, over learning rates, with every method, and compare.

A method that balances should not feel the factors, and one that is good should not need its learning rate tuned. At a
spread of 1e4 the last of the losses is multiplied by 1e4; of ten losses the others by factors between, in equal ratios;
the first keeps its own. "adam" is Adam on the sum of the losses, "adam-by-hand" the oracle, which undoes the factors.
Every run is a line of runs.csv in the output folder; runs that are there already are not repeated, so that the command
may be interrupted, or called again with more. Of every problem there is a table and a figure of what was asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from example_projects.common.report import markdown
from example_projects.common.run_file import Run, append_run, read_runs
from example_projects.mnist.data import find_data
from example_projects.problems.catalogue import PROBLEMS
from example_projects.problems.problem import Problem
from example_projects.sensitivity.figure import draw
from example_projects.sensitivity.grid import LRS, SPREADS, STEPS
from example_projects.sensitivity.law import law
from example_projects.sensitivity.methods import METHODS
from example_projects.sensitivity.table import table
from example_projects.sensitivity.training import train

LAW_STEPS = 50
WHAT = ("problem", "method", "spread", "lr", "steps", "seed")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m example_projects.sensitivity",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="what is trained")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help="one or several of: " + ", ".join(METHODS))  # fmt: skip
    add("--spreads", nargs="+", type=float, default=list(SPREADS), help="of the factors on the losses")
    add("--lrs", nargs="+", type=float, default=list(LRS), help="learning rates")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run per cell of the grid and seed")
    add("--steps", type=int, default=None, help=f"of a run; if left out {STEPS}")
    add("--data-dir", type=Path, default=None, help="folder with MNIST's four idx files, as for the mnist project")
    add("--output-dir", type=Path, default=Path("runs/sensitivity"), help="where runs, tables and figures go")
    return parser.parse_args(arguments)


def key_of(run: Run) -> tuple[str, ...]:
    """What makes a run what it is."""
    return tuple(run[name] for name in WHAT)


def planned(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """What is to be trained, all of one seed before the next."""
    order = product(options.seeds, options.problem, options.spreads, options.lrs, options.method)
    for seed, problem, spread, lr, method in order:
        if not METHODS[method].suits(problem):
            continue
        steps = options.steps or STEPS[problem]
        values = (problem, method, f"{spread:g}", f"{lr:g}", str(steps), str(seed))
        yield dict(zip(WHAT, values, strict=True))


def train_missing(options: argparse.Namespace, problems: dict[str, Problem], file: Path) -> None:
    """Train what the file does not hold, with a line for each run."""
    done = {key_of(run) for run in read_runs(file)}
    missing = [what for what in planned(options) if key_of(what) not in done]
    for index, what in enumerate(missing, start=1):
        outcome = train(
            problems[what["problem"]],
            METHODS[what["method"]],
            float(what["spread"]),
            float(what["lr"]),
            int(what["steps"]),
            int(what["seed"]),
        )
        append_run(file, {**what, **{name: f"{value:.6g}" for name, value in vars(outcome).items()}})
        print(f"{index}/{len(missing)}", *what.values(), f"{outcome.value:.4g}", flush=True)


def write(folder: Path, problem: Problem, runs: list[Run]) -> None:
    """Print the table of a problem, and write it and the figure."""
    rows = markdown(table(runs, len(problem.terms)))
    (folder / f"{problem.name}.md").write_text(rows + "\n")
    draw(runs, problem.metric_name.replace("_", " "), folder / f"{problem.name}.png")
    print(f"\n{problem.name}: {problem.metric_name}, the median over the seeds\n\n{rows}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    data = find_data(options.data_dir)[0] if set(options.problem) != {"equation"} else Path()
    problems = {name: PROBLEMS[name](data) for name in options.problem}
    train_missing(options, problems, folder / "runs.csv")
    asked = {key_of(what) for what in planned(options)}
    runs = [run for run in read_runs(folder / "runs.csv") if key_of(run) in asked]
    for name, problem in problems.items():
        write(folder, problem, [run for run in runs if run["problem"] == name])
    held = markdown(law(list(problems.values()), options.spreads, min(LAW_STEPS, options.steps or LAW_STEPS)))
    (folder / "law.md").write_text(held + "\n")
    print(f"\nMTAdam in double precision: the largest relative change of a trained loss by factors\n\n{held}")
    print(f"\nWritten to {folder}: runs.csv, and of every problem a table (.md) and a figure (.png).")


if __name__ == "__main__":
    main()
