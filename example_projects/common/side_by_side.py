"""Several runs at once, each in a process of its own, on the same device."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from example_projects.common.command import keep_quiet
from example_projects.common.image_project import ImageProject, Job, project_of, train_announced
from example_projects.common.runs import Result


def train_side_by_side(project: ImageProject, options: argparse.Namespace, jobs: Iterable[Job]) -> list[Result]:
    """Train ``options.parallel`` runs at a time, and return the results in the order of the jobs.

    After an error no more runs are begun, and those that go on are waited for.
    """
    threads = max(1, torch.get_num_threads() // options.parallel)
    # Spawned, for a process that was forked could not use a GPU.
    pool = ProcessPoolExecutor(options.parallel, get_context("spawn"), initializer=_set_up, initargs=(threads,))
    try:
        runs = [pool.submit(_train, project.name, options, job) for job in jobs]
        return [run.result() for run in runs]
    finally:
        pool.shutdown(cancel_futures=True)


def _set_up(threads: int) -> None:
    """Once in each process. Ctrl-C is for the run that is in progress there, which listens for it, or for nobody."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    keep_quiet()


def _train(name: str, options: argparse.Namespace, job: Job) -> Result:
    """A project is not sent to another process: it is imported there."""
    return train_announced(project_of(name), argparse.Namespace(**{**vars(options), "progress_bar": False}), job)
