"""One image project and its runs: what differs between pix2pix, CycleGAN and SRGAN, and what does not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from example_projects.common.choosing import HELD_BACK
from example_projects.common.evaluation import Evaluation, Metrics
from example_projects.common.image_data import ImageData
from example_projects.common.image_metrics import ImageMetrics, make_distance
from example_projects.common.image_module import ImageModule
from example_projects.common.methods import Method
from example_projects.common.runs import Result, run
from example_projects.common.samples import Samples
from lightning_mtadam import MTAdam
from lightning_mtadam.callbacks import BalanceWeightMonitor

# Options that a run may be continued with another value of.
NOT_OF_A_RUN = {
    "method", "seeds", "lr", "setting", "output_dir", "resume", "accelerator", "devices", "strategy", "num_workers",
    "checkpoint_every", "log_every", "progress_bar", "samples", "trials", "search_metric", "metric_given", "parallel",
    "stop_at",
}  # fmt: skip


def pixel_metrics(options: argparse.Namespace) -> Metrics:
    """L1, L2, NMSE, PSNR and SSIM, and the Frechet distance that was asked for."""
    return ImageMetrics(make_distance(options.feature_extractor, options.weights))


def name_of_folder(options: argparse.Namespace) -> Sequence[str]:
    """The data set is called as its folder is."""
    return [options.data_dir.name] if options.data_dir else []


@dataclass(frozen=True)
class ImageProject:
    """What a project is made of.

    Attributes:
        name: of its package.
        description: of its command.
        lambdas: per setting ("unbalanced", "balanced") what each term is multiplied by, the anchor first.
        columns: the metrics of its table, as in the paper; those that were not measured are left out.
        defaults: of the options that all projects have, where they differ.
        make_data: takes the options and the seed.
        make_module: takes the options, the method, the lambdas and the learning rate.
        begin: gives a module what its training begins with, that is not made before the references.
        make_metrics: takes the options.
        evaluation: makes the callback that measures, of the run's folder and the metrics.
        add_options: adds the project's own options to the parser.
        references: takes the options and gives rows of the table that are no method's; called before any training.
        paper: the paper's numbers, where they are known: per data set and method, by metric.
        paper_columns: which column a metric of the paper belongs to, where it has another name.
        data_sets: takes the options and names the data sets that are measured, as far as the paper measures the same.
        full_size: the options that the paper's numbers are of, where they are not the defaults.
        size_note: a sentence on that size.
        not_the_papers: per setting the methods that the paper trained with other lambdas, and a sentence that says so.
    """

    name: str
    description: str
    lambdas: Mapping[str, Mapping[str, float]]
    columns: Sequence[str]
    defaults: Mapping[str, Any]
    make_data: Callable[[argparse.Namespace, int], ImageData]
    make_module: Callable[[argparse.Namespace, Method, Mapping[str, float], float], ImageModule]
    begin: Callable[[ImageModule, argparse.Namespace], None] = lambda module, options: None
    make_metrics: Callable[[argparse.Namespace], Metrics] = pixel_metrics
    evaluation: Callable[[Path, Any], Evaluation] = Evaluation
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    references: Callable[[argparse.Namespace], Sequence[Result]] = lambda options: ()
    paper: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    paper_columns: Mapping[str, str] = field(default_factory=dict)
    data_sets: Callable[[argparse.Namespace], Sequence[str]] = name_of_folder
    full_size: Mapping[str, Any] = field(default_factory=dict)
    size_note: str = ""
    not_the_papers: Mapping[str, tuple[Sequence[str], str]] = field(default_factory=dict)


PROJECTS = ("pix2pix", "cyclegan", "srgan")


def project_of(name: str) -> ImageProject:
    """The project of that name."""
    project: ImageProject = import_module(f"example_projects.{name}.__main__").PROJECT
    return project


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: of the method.
        method: how the generator is trained.
        lambdas: of the generator's terms.
        lr: learning rate.
        seed: of initial weights, data and augmentation.
    """

    name: str
    method: Method
    lambdas: Mapping[str, float]
    lr: float
    seed: int

    def folder(self, options: argparse.Namespace) -> Path:
        """Where the run is kept."""
        return Path(options.output_dir) / f"{options.setting}-lr{self.lr:g}" / f"{self.name}-seed{self.seed}"


def train(
    project: ImageProject,
    options: argparse.Namespace,
    job: Job,
    *,
    folder: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> Result:
    """Train, validate and test one run in its folder, or continue it, or read its result (see :func:`~runs.run`)."""
    folder = folder or job.folder(options)
    pl.seed_everything(job.seed, verbose=False)
    data = project.make_data(options, job.seed)
    module = project.make_module(options, job.method, job.lambdas, job.lr)
    project.begin(module, options)
    evaluation = project.evaluation(folder, project.make_metrics(options))
    shown: list[pl.Callback] = [evaluation, Samples(folder, options.samples)]
    if job.method.optimizer is MTAdam:
        shown.append(BalanceWeightMonitor())
    return run(
        folder,
        module,
        data,
        lambda trainer: {**read_metrics(trainer), **(held_back_metrics(evaluation) if options.validation else {})},
        settings=settings_of(options, job),
        resume=options.resume,
        checkpoint_every=options.checkpoint_every,
        stop_at=options.stop_at,
        callbacks=[*shown, *callbacks],
        log_every_n_steps=options.log_every,
        max_epochs=options.max_epochs,
        check_val_every_n_epoch=options.metrics_every,
        limit_train_batches=options.limit_train_batches,
        limit_val_batches=options.limit_test_batches,
        limit_test_batches=options.limit_test_batches,
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=options.strategy,
        precision=options.precision,
        enable_progress_bar=options.progress_bar,
    )


def train_announced(project: ImageProject, options: argparse.Namespace, job: Job) -> Result:
    """Train one run of a table, say so, and name its result."""
    weights = ", ".join(f"{factor:g} {term}" for term, factor in job.lambdas.items())
    rank_zero_only(print)(f"{job.name}, seed {job.seed}, lr {job.lr:g}, {weights}", flush=True)
    label = job.name if len(options.lr) == 1 else f"{job.name}, lr {job.lr:g}"
    folder = str(job.folder(options).relative_to(options.output_dir))
    return {"method": label, "lr": job.lr, "seed": job.seed, "folder": folder, **train(project, options, job)}


def held_back_metrics(evaluation: Evaluation) -> Result:
    """The last metrics of the images that were held back; none, if they were never measured."""
    newest = evaluation.history[-1] if evaluation.history else {}
    return {f"{HELD_BACK}{name}": value for name, value in newest.items() if name != "epoch"}


def read_metrics(trainer: pl.Trainer) -> Result:
    """The metrics of the hold-out set after training."""
    found = trainer.callback_metrics.items()
    return {name.removeprefix("test/"): float(value) for name, value in found if name.startswith("test/")}


def settings_of(options: argparse.Namespace, job: Job) -> dict[str, object]:
    """What makes the run what it is."""
    chosen = {name: value for name, value in vars(options).items() if name not in NOT_OF_A_RUN}
    plain: dict[str, object] = json.loads(json.dumps(chosen, default=str))  # as they will be read again
    return {**plain, "lambdas": dict(job.lambdas)}
