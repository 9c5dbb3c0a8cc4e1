"""Compare every method on the same problems, each with the same processor seconds for its search.

``run`` searches a learning rate, and weights where the method has any, on the validation part, and then trains fresh
seeds, which are measured on the test part once. ``cost`` measures processor time, methods in turn. Every run is a line
of a file; runs that are there are not repeated, so that a command may be interrupted, and called again with more.
``tables`` and ``figures`` show what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from example_projects.common.command import run_command
from example_projects.common.run_file import Run, read_runs
from example_projects.common.values import Distinct, positive, rate, seed
from example_projects.evidence.figures import draw
from example_projects.evidence.methods import METHODS
from example_projects.evidence.problems.catalogue import PROBLEMS
from example_projects.evidence.problems.problem import Problem
from example_projects.evidence.runner import Plan, Runner
from example_projects.evidence.tables import tables


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m example_projects.evidence", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("run", "search, then test"), ("cost", "compare processor times")):
        _add_what_to_run(commands.add_parser(name, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    for name, about in (("tables", "write tables.md"), ("figures", "write PNG files")):
        command = commands.add_parser(name, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--runs", nargs="+", type=Path, required=True, help="files that run and cost have written")
        command.add_argument("--output-dir", type=Path, default=Path("runs/evidence"), help="where they go")
    return parser.parse_args(arguments)


def _add_what_to_run(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--problems", nargs="+", action=Distinct, choices=PROBLEMS, required=True, help="in this order")
    add("--methods", nargs="+", action=Distinct, choices=METHODS, default=list(METHODS), metavar="METHOD",
        help="one or several of: " + ", ".join(METHODS))  # fmt: skip
    add("--factors", nargs="+", action=Distinct, type=rate, default=[1.0], help="on the losses")
    add("--seeds", type=positive, default=10, help="how many")
    add("--first-seed", type=seed, default=0, help="the others follow it")
    add("--budget-seconds", type=rate, default=60.0, help="processor time for each search")
    add("--lr", type=rate, default=None, help="a learning rate, in place of a search")
    add("--steps", type=positive, default=None, help="of a run, in place of the problem's")
    add("--data-dir", type=Path, default=Path("data"), help="with mnist, burgers and tox21")
    add("--out", type=Path, default=Path("runs/evidence/runs.csv"), help="the file of the runs")


def carry_out(options: argparse.Namespace) -> None:
    """Run, or measure times."""
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    plan = Plan(options.methods, options.factors, seeds, options.budget_seconds, options.lr, options.steps)
    runner = Runner(options.out)
    for name in options.problems:
        problem = make_problem(name, options.data_dir)
        if options.command == "run":
            runner.carry_out(problem, plan)
        else:
            runner.time(problem, plan)


def make_problem(name: str, data_dir: Path) -> Problem:
    """The problem of that name.

    Raises:
        FileNotFoundError: its data are not there.
    """
    try:
        return PROBLEMS[name](data_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The data of {name} are missing: {error}. Give --data-dir the folder that has mnist/, burgers/ and tox21/."
        ) from error


def show(options: argparse.Namespace) -> None:
    """Write tables or figures.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: there is no run in them.
    """
    for file in options.runs:
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}. Give --runs files that run or cost has written.")
    runs: list[Run] = [run for file in options.runs for run in read_runs(file)]
    if not runs:
        raise ValueError("There is no run in the files of --runs. Give files that run or cost has written.")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.command == "tables":
        written = tables(runs)
        (options.output_dir / "tables.md").write_text(written)
        print(written)
    else:
        print("Written:", *draw(runs, options.output_dir))


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    try:
        (carry_out if options.command in ("run", "cost") else show)(options)
    except KeyboardInterrupt:
        print("Interrupted. Call it again to go on with the run that was in progress.")


if __name__ == "__main__":
    run_command(main)
