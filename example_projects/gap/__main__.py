"""Train small problems with Adam on a well-weighted sum and with settings of MTAdam, over learning rates, and compare.

A setting is written as "adam" or "mtadam", with options behind a colon: mtadam:denominator=sum,beta3=0.99. A term's
name sets its weight, with MTAdam its importance: adam:boundary=100. "adam" has the weights that are known to be good,
"adam:weights=given" those the problem comes with, which MTAdam gets too. mtadam:anchor=max-mean@0.5 changes the anchor
after half of the steps; mtadam:beta2.boundary=0.99 gives a term a beta2 of its own, mtadam:beta2=fallen each term one
that is the smaller, the further its gradient norm has fallen. Every run is a line of runs.csv in the output folder;
runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

from example_projects.common.report import markdown, write_csv
from example_projects.common.run_file import Run, append_run, read_runs
from example_projects.gap.settings import read_setting
from example_projects.gap.table import table
from example_projects.gap.training import train
from example_projects.mnist.data import find_data
from example_projects.problems.catalogue import PROBLEMS

WHAT = ("problem", "setting", "decay", "lr", "steps", "seed")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m example_projects.gap", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    add("--settings", nargs="+", default=["adam", "mtadam"], metavar="SETTING")
    add("--lrs", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2], help="learning rates")
    add("--decay", nargs="+", choices=("none", "linear"), default=["none", "linear"], help="of the learning rate, to 0")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=None, help="the problem's own if left out")
    add("--data-dir", type=Path, default=None, help="folder with MNIST's four idx files, as for the mnist project")
    add("--output-dir", type=Path, default=Path("runs/gap"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    settings = [read_setting(name) for name in options.settings]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "runs.csv"
    done = {tuple(run[name] for name in WHAT) for run in read_runs(file)}
    folder = find_data(options.data_dir)[0] if set(options.problem) != {"equation"} else Path()
    for name in options.problem:
        problem = PROBLEMS[name](folder)
        steps = options.steps or problem.steps
        for setting, decay, seed, lr in product(settings, options.decay, options.seeds, options.lrs):
            what = dict(zip(WHAT, (name, setting.name, decay, f"{lr:g}", str(steps), str(seed)), strict=True))
            if tuple(what.values()) in done:
                continue
            figures = train(problem, setting, lr, decay, steps, seed)
            print(*what.values(), f"{figures[problem.metric_name]:.4g}", flush=True)
            append_run(file, {**what, "metric": problem.metric_name, "figures": json.dumps(figures)})
    write(options.output_dir, read_runs(file))


def write(folder: Path, runs: list[Run]) -> None:
    """Print the table of all runs in the folder, and write it as Markdown and CSV."""
    rows = table(runs)
    (folder / "table.md").write_text(markdown(rows) + "\n")
    write_csv(folder / "table.csv", rows)
    print(
        f"\n{markdown(rows)}\n\nGeometric mean over n seeds (smallest to largest). Every run is in {folder}/runs.csv."
    )


if __name__ == "__main__":
    main()
