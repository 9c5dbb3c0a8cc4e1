"""Search for the lambdas of the generator's terms: random ones, of which Hyperband ends the bad ones early.

The search looks at the images that --validation holds back. Without, it looks at the hold-out set, as the table does:
what it finds is favoured by that, against the other methods.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import optuna
from optuna.pruners import HyperbandPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from torch.optim import Adam

from example_projects.common.choosing import HIGHER_IS_BETTER, judged_by
from example_projects.common.disk import make_folder
from example_projects.common.image_project import ImageProject, Job, settings_of, train
from example_projects.common.methods import Method
from example_projects.common.runs import LAST, check_settings

LOWEST, HIGHEST = 1e-4, 1e4  # of a lambda, relative to that of the first term, as in the paper
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
HANDLED = (*ENDED, TrialState.WAITING)


def search(project: ImageProject, options: argparse.Namespace, lr: float) -> dict[str, float]:
    """Train with Adam on ``options.trials`` random lambdas and return the best of those that were not ended early.

    With ``options.resume`` an interrupted search goes on with the trial that it was at.

    Raises:
        ValueError: a search is to be continued that was made with other settings.
    """
    terms = list(project.lambdas[options.setting])
    seed = options.seeds[0]
    folder = folder_of(options, lr)
    study = _open_study(project, options, lr)
    _enqueue(study, draws(terms, options.trials, seed))

    def objective(trial: optuna.Trial) -> float:
        lambdas = {term: trial.suggest_float(term, LOWEST, HIGHEST, log=True) for term in terms[1:]}
        job = Job("hyperband", Method(Adam), {terms[0]: 1.0, **lambdas}, lr, seed)
        own = folder / f"trial{trial.user_attrs['draw']}"
        go_on = argparse.Namespace(**{**vars(options), "resume": True})
        try:
            result = train(project, go_on, job, folder=own, callbacks=[Prune(trial, options.search_metric)])
        except optuna.TrialPruned:
            _forget_networks(own)
            raise
        _forget_networks(own)
        return judged_by(result, options.search_metric)

    study.optimize(objective, n_trials=len(study.get_trials(states=[TrialState.WAITING])))
    return {terms[0]: 1.0, **study.best_params}


def folder_of(options: argparse.Namespace, lr: float) -> Path:
    """Where the search is kept."""
    return Path(options.output_dir) / f"{options.setting}-lr{lr:g}" / "hyperband-search"


def _settings(options: argparse.Namespace, lr: float) -> dict[str, object]:
    return {"metric": options.search_metric, **settings_of(options, Job("hyperband", Method(Adam), {}, lr, 0))}


def check_stored_search(project: ImageProject, options: argparse.Namespace, lr: float) -> bool:
    """Whether there is a search to resume.

    Raises:
        ValueError: it was made with other settings; naming what differs.
    """
    folder = folder_of(options, lr)
    resumed = options.resume and _has_begun(project, folder)
    if resumed:
        check_settings(folder / "settings.json", _settings(options, lr))
    return resumed


def _storage(folder: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(folder / "trials.log")))


def _has_begun(project: ImageProject, folder: Path) -> bool:
    """Whether a trial has ended, or has a checkpoint."""
    if not (folder / "trials.log").exists():
        return False
    storage = _storage(folder)
    known = project.name in optuna.get_all_study_names(storage)
    ended = known and optuna.load_study(study_name=project.name, storage=storage).get_trials(states=ENDED)
    return bool(ended) or any(folder.glob(f"trial*/{LAST}"))


def _forget_networks(trial: Path) -> None:
    """Of so many networks, none is used again; only a trial that was interrupted needs its own, to go on."""
    shutil.rmtree(trial / "checkpoints", ignore_errors=True)


def draws(terms: list[str], count: int, seed: int) -> list[dict[str, float]]:
    """Random lambdas of all terms but the first, whose lambda is 1: Adam does not feel a common factor.

    The first ones are the same whatever the count.
    """
    exponents = np.random.default_rng(seed).uniform(math.log(LOWEST), math.log(HIGHEST), (count, len(terms) - 1))
    return [dict(zip(terms[1:], row, strict=True)) for row in np.exp(exponents).tolist()]


class Prune(pl.Callback):
    """Reports a metric after every validation, and ends the trial if Hyperband says so or the metric is not finite.

    What was reported is part of the checkpoint: a trial that goes on is a new one for Optuna, which is told it again.

    Args:
        trial: of the study.
        metric: by its name in the table.
    """

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        self.trial, self.metric = trial, metric
        self._reported: dict[int, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What was reported, by epoch."""
        return {"reported": dict(self._reported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Report it again."""
        for epoch, value in state_dict["reported"].items():
            self._report(value, epoch)

    def _report(self, value: float, epoch: int) -> None:
        self._reported[epoch] = value
        self.trial.report(value, epoch)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report."""
        value = trainer.callback_metrics[f"val/{self.metric}"].item()
        if not math.isfinite(value):
            raise optuna.TrialPruned
        self._report(value, trainer.current_epoch + 1)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def _open_study(project: ImageProject, options: argparse.Namespace, lr: float) -> optuna.Study:
    folder = folder_of(options, lr)
    if not check_stored_search(project, options, lr):
        shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    (folder / "settings.json").write_text(json.dumps(_settings(options, lr), indent=2))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=_storage(folder),
        study_name=project.name,  # the bracket of a trial depends on it
        direction="maximize" if options.search_metric.endswith(HIGHER_IS_BETTER) else "minimize",
        sampler=optuna.samplers.RandomSampler(),  # never asked: all trials are enqueued
        pruner=HyperbandPruner(max_resource=options.max_epochs),
        load_if_exists=True,
    )


def _enqueue(study: optuna.Study, lambdas: list[Mapping[str, float]]) -> None:
    """Enqueue what was not tried to its end."""
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # when the process was ended
        study.tell(trial.number, state=TrialState.FAIL)
    handled = {trial.user_attrs["draw"] for trial in study.get_trials(states=HANDLED)}
    for draw, chosen in enumerate(lambdas):
        if draw not in handled:
            study.enqueue_trial(chosen, user_attrs={"draw": draw})
