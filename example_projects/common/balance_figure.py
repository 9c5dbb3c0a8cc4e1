"""Draw the balance of a run from its log directory: all terms over the steps, and layers by terms."""

from __future__ import annotations

import argparse
from pathlib import Path

from example_projects.common.command import run_command
from lightning_mtadam.callbacks import plot_balance


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m example_projects.common.balance_figure", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the log directory of one run of MTAdam or a balancer")
    parser.add_argument("--output", type=Path, required=True, help="the PNG file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    plot_balance(options.run).save(options.output)
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    run_command(main)
