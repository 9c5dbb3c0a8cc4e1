"""The command of every image project: its runs, and its table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Adam

from example_projects.common.before_training import check_jobs, check_modules, check_stored_jobs
from example_projects.common.choosing import best_rates
from example_projects.common.command import goes_on, keep_quiet, write_tables
from example_projects.common.image_options import HYPERBAND, parser_of
from example_projects.common.image_project import ImageProject, Job, train_announced
from example_projects.common.methods import IMAGE_METHODS, Method
from example_projects.common.runs import Result
from example_projects.common.side_by_side import train_side_by_side


def jobs_of(project: ImageProject, options: argparse.Namespace) -> Iterator[Job]:
    """The runs that the options ask for; of "hyperband" after its search, of which there is one per learning rate."""
    found: dict[float, dict[str, float]] = {}
    for seed in options.seeds:
        for lr in options.lr:
            for name in options.method:
                if name == HYPERBAND:
                    found[lr] = found.get(lr) or _search(project, options, lr)
                    yield Job(name, Method(Adam), found[lr], lr, seed)
                else:
                    method = IMAGE_METHODS[name].anchored(options.anchor)
                    setting = prescribed(project, options.setting) if method.balanced else options.setting
                    yield Job(name, method, project.lambdas[setting], lr, seed)


def prescribed(project: ImageProject, setting: str) -> str:
    """The setting with the weights that a setting has unbalanced."""
    balanced = setting.replace("unbalanced", "balanced")
    return balanced if balanced in project.lambdas else "balanced"


def check_search(options: argparse.Namespace) -> None:
    """Raise unless the lambdas can be searched for.

    Raises:
        ValueError: several processes are asked for.
        ImportError: Optuna is not there.
    """
    if not in_one_process(options):
        raise ValueError("hyperband searches in one process: give --devices 1, without --strategy.")
    if find_spec("optuna") is None:
        raise ImportError("hyperband needs Optuna: pip install optuna.")


def in_one_process(options: argparse.Namespace) -> bool:
    """Whether a run is trained by one process."""
    one = options.devices == "1" or (options.devices == "auto" and torch.cuda.device_count() < 2)
    return one and options.strategy == "auto"


def chooses(options: argparse.Namespace) -> bool:
    """Whether learning rates are chosen before all seeds are trained."""
    return options.validation > 0 and len(options.lr) > 1


def check_options(project: ImageProject, options: argparse.Namespace) -> None:
    """Raise unless the options go together.

    Raises:
        ValueError: they do not.
        ImportError: "hyperband" is asked for without Optuna.
    """
    if HYPERBAND in options.method:
        check_search(options)
    if options.parallel > 1 and not in_one_process(options):
        raise ValueError("--parallel trains several runs on one device: give --devices 1, without --strategy.")
    if options.validation and options.max_epochs % options.metrics_every:
        raise ValueError(
            "--max-epochs must be a multiple of --metrics-every, so that what --validation holds back is measured at"
            f" the end, but they are {options.max_epochs} and {options.metrics_every}."
        )
    measured = [name for name in project.make_metrics(options).names if name.split()[-1] != "n"]
    wanted = options.search_metric
    if (HYPERBAND in options.method or chooses(options) or options.metric_given) and wanted not in measured:
        raise ValueError(f"{wanted!r} is not measured. Give --search-metric one of {', '.join(measured)}.")


def check_runs(project: ImageProject, options: argparse.Namespace) -> None:
    """Raise unless every run can be made, of "hyperband" what is known before its search.

    Raises:
        ValueError: naming what is wrong.
        FileExistsError: a file is where the output should go.
    """
    others = [name for name in options.method if name != HYPERBAND]
    check_jobs(project, options, list(jobs_of(project, argparse.Namespace(**{**vars(options), "method": others}))))
    if HYPERBAND in options.method:
        from example_projects.common.hyperband import check_stored_search

        any_job = Job(HYPERBAND, Method(Adam), project.lambdas[options.setting], options.lr[0], options.seeds[0])
        check_modules(project, options, [any_job])
        for lr in options.lr:
            check_stored_search(project, options, lr)


def _search(project: ImageProject, options: argparse.Namespace, lr: float) -> dict[str, float]:
    from example_projects.common.hyperband import search

    print(f"hyperband: {options.trials} trials, lr {lr:g}", flush=True)
    return search(project, options, lr)


def reservation(options: argparse.Namespace) -> str:
    """What the reader of a table must know; empty if there is nothing."""
    if HYPERBAND not in options.method or options.validation:
        return ""
    return (
        f"The lambdas of {HYPERBAND} are the best of {options.trials} trials by {options.search_metric} on the hold-out"
        " set, the same that is measured here: that favours it against the other methods."
    )


def train_all(project: ImageProject, options: argparse.Namespace) -> list[Result]:
    """Run what the options ask for and return the results, after those of the references.

    Where learning rates are chosen, the first seed is trained with all of them, the other seeds with the chosen.

    Raises:
        ValueError: options do not go together, images cannot be used, or a run cannot be made; raised before any run.
    """
    check_options(project, options)
    data = project.make_data(options, options.seeds[0])
    rank_zero_only(print)(data.announcement, flush=True)
    data.check()
    check_runs(project, options)
    results = list(project.references(options))
    jobs = list(jobs_of(project, options))
    check_stored_jobs(options, jobs)  # those of hyperband, too, whose lambdas are known now
    if not chooses(options):
        return results + train_jobs(project, options, jobs)
    first = train_jobs(project, options, [job for job in jobs if job.seed == options.seeds[0]])
    rates = best_rates(first, options.search_metric)
    others = [job for job in jobs if job.seed != options.seeds[0] and job.lr == rates[job.name]]
    return results + first + train_jobs(project, options, others)


def train_jobs(project: ImageProject, options: argparse.Namespace, jobs: Sequence[Job]) -> list[Result]:
    """Train one after the other, or several at a time, and return the results in the order of the jobs."""
    if options.parallel > 1:
        return train_side_by_side(project, options, jobs)
    return [train_announced(project, options, job) for job in jobs]


def columns_of(project: ImageProject, results: Sequence[Result]) -> list[str]:
    """The project's columns that were measured, by set if there are several, the number of images, and the time."""
    wanted = [*project.columns, "n", "seconds_per_step"]
    found = list(dict.fromkeys(name for result in results for name in result))
    return [name for column in wanted for name in found if name == column or name.endswith(f" {column}")]


def print_table(options: argparse.Namespace, table: str, files: str) -> None:
    """Print a table with its notes, and the files that were written."""
    print(f"\n{table}\n\nWritten to {options.output_dir}: {files}.")


def main(project: ImageProject, arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parser_of(project).parse_args(arguments)
    options.resume = goes_on(options)
    keep_quiet()
    write(project, options, train_all(project, options))


@rank_zero_only
def write(project: ImageProject, options: argparse.Namespace, results: list[Result]) -> None:
    """Print the table and write it as Markdown and CSV, with the runs it summarises."""
    table = write_tables(options, results, columns_of(project, results))
    said = "\n\n".join(part for part in (table, reservation(options)) if part)
    print_table(options, said, "table.md, table.csv; every run in results.csv")
    print(f"See samples, curves and the balance with: tensorboard --logdir {options.output_dir}")
