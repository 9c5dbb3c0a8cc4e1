"""List the example projects: what each is, how long it takes, and a command to begin with.

The data come with the projects, or are generated. Times are the processor's, with one thread. At the paper's size the
image projects need a GPU: docs/experiments/gpu.md has the commands, and what they are estimated to take.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Beginning(NamedTuple):
    """A command that shows what a project is, and how long it takes.

    Attributes:
        options: of ``python -m example_projects.<project>``.
        minutes: of processor time.
        how: "measured" with exactly this command, or "estimated" from the others.
    """

    options: str
    minutes: float
    how: str = "measured"


BEGINNINGS: Mapping[str, Beginning] = {
    "mnist": Beginning("--data-dir example_projects/mnist/subset --method mtadam adam", 1.5),
    "pinn": Beginning("--seeds 0 --method mtadam adam", 0.5),
    "pix2pix": Beginning("--image-size 64 --width 16 --batch-size 4 --max-epochs 2", 0.5),
    "cyclegan": Beginning("--image-size 64 --width 12 --blocks 2 --max-epochs 1 --limit-train-batches 50", 0.6),
    "srgan": Beginning(
        "--image-size 48 --width 16 --blocks 4 --batch-size 4 --crops-per-image 4 --pretrain-epochs 8 --max-epochs 2"
        " --perceptual-weights random",
        0.8,
    ),
    "evidence": Beginning(
        "run --problems toy2d --methods recommended adam_searched --seeds 2 --budget-seconds 10", 1, "estimated"
    ),
    "compare": Beginning(
        "pix2pix --image-size 64 --width 16 --batch-size 4 --max-epochs 2 --method mtadam adam", 0.5, "estimated"
    ),
}


def line_of(project: str) -> str:
    """What a project is: the first line of its docstring, which is read without the imports below it."""
    spec = find_spec(f"example_projects.{project}")
    source = Path(str(spec and spec.origin)).read_text()
    return str(ast.get_docstring(ast.parse(source))).partition("\n")[0]


def listing() -> str:
    """A line for each project with how long it takes, and the command below it."""
    entries = [
        f"{name}: {line_of(name)} {minutes:g} minutes, {how}.\n    python -m example_projects.{name} {options}"
        for name, (options, minutes, how) in BEGINNINGS.items()
    ]
    return "\n\n".join(entries)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    argparse.ArgumentParser("python -m example_projects", description=__doc__).parse_args(arguments)
    print(f"{__doc__}\n{listing()}\n\n--help after the name of a project lists all of its options.")


if __name__ == "__main__":
    main()
