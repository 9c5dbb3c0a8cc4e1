"""Compare methods on an image project: train them one after the other, each with several seeds, and write a report.

The options after the project's name are those of its own command, which --help after the name lists. Runs that have
ended are skipped, an interrupted one is continued, so that the same command may be given again with more methods,
seeds or learning rates. Written to the output folder: comparison.md, table.csv, curves.png, samples.png, results.csv.
"""

from __future__ import annotations

import argparse

from lightning.pytorch.utilities import rank_zero_only

from example_projects.common.command import keep_quiet, run_command
from example_projects.common.comparison import write_comparison
from example_projects.common.image_command import parser_of, print_table, train_all
from example_projects.common.image_project import PROJECTS, ImageProject, project_of


def parse(arguments: list[str] | None = None) -> tuple[ImageProject, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m example_projects.compare", description=__doc__)
    parser.add_argument("project", choices=PROJECTS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="those of python -m example_projects.PROJECT")
    chosen = parser.parse_args(arguments)
    project = project_of(chosen.project)
    return project, parser_of(project).parse_args([*chosen.options, "--resume"])


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    project, options = parse(arguments)
    keep_quiet()
    write(project, options, train_all(project, options))


@rank_zero_only
def write(project: ImageProject, options: argparse.Namespace, results: list[dict[str, object]]) -> None:
    """Print the table with its notes and write the report."""
    table = write_comparison(project, options, results)
    print_table(options, table, "comparison.md, table.csv, curves.png, samples.png, results.csv")


if __name__ == "__main__":
    run_command(main)
