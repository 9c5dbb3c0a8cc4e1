"""What is checked before anything is trained, so that no run's time is spent when another one cannot be made."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from example_projects.common.disk import check_way
from example_projects.common.image_project import ImageProject, Job, settings_of
from example_projects.common.runs import check_stored
from lightning_mtadam.terms import ANCHOR_POLICIES


def check_jobs(project: ImageProject, options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Raise unless every job can be trained: its place, its anchor, what is stored of it, its networks and optimizers.

    Raises:
        ValueError: naming what is wrong.
        FileExistsError: a file is where the output should go.
    """
    check_way(options.output_dir)
    check_anchor(project, options)
    check_stored_jobs(options, jobs)
    check_modules(project, options, jobs)


def check_modules(project: ImageProject, options: argparse.Namespace, jobs: Iterable[Job]) -> None:
    """Raise unless networks and optimizers can be made, which depend on a job's method, and not on rate and seed.

    Raises:
        ValueError: naming what is wrong.
    """
    for job in {job.name: job for job in jobs}.values():
        project.make_module(options, job.method, job.lambdas, job.lr).configure_optimizers()


def check_anchor(project: ImageProject, options: argparse.Namespace) -> None:
    """Raise unless the anchor is a policy of MTAdam or one of the terms, whatever the methods.

    Raises:
        ValueError: naming those that there are.
    """
    known = (*ANCHOR_POLICIES, *project.lambdas[options.setting])
    if options.anchor not in known:
        raise ValueError(f"--anchor must be one of {', '.join(known)}, but is {options.anchor!r}.")


def check_stored_jobs(options: argparse.Namespace, jobs: Iterable[Job]) -> None:
    """Raise if one of the jobs is to be resumed that was made with other settings.

    Raises:
        ValueError: naming what differs.
    """
    for job in jobs if options.resume else ():
        check_stored(job.folder(options), settings_of(options, job))
