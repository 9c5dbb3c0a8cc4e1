"""One training run in a folder of its own: checkpoints while it goes on, its result when it has ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from example_projects.common.clock import TrainingClock
from example_projects.common.disk import make_folder, naming_a_full_disk
from example_projects.common.exact_resume import RandomState
from example_projects.common.saving import Saving

Result = dict[str, Any]
RESULT, LAST = Path("result.json"), Path("checkpoints", "last.ckpt")  # in the folder of a run


def run(
    folder: Path,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    read_result: Callable[[pl.Trainer], Result],
    *,
    settings: Mapping[str, object],
    resume: bool,
    checkpoint_every: int = 100,
    stop_at: float | None = None,
    callbacks: Sequence[pl.Callback] = (),
    **trainer_options: Any,
) -> Result:
    """Train and test, or continue, or read the result of a run that has ended.

    Args:
        folder: where checkpoints, logs and the result are kept.
        module: what to train.
        data: what to train it on.
        read_result: takes the figures to report from the trainer after testing.
        settings: what makes this run what it is; a run is only continued with the same.
        resume: continue from the last checkpoint, and do not repeat what has ended.
        checkpoint_every: batches between checkpoints.
        stop_at: when time is up, in seconds since the epoch.
        callbacks: more callbacks.
        trainer_options: for the trainer.

    Raises:
        ValueError: a run is to be continued that was made with other settings.
        OSError: the disk is full.
        NotEndedError: time is up.

    Returns:
        The figures, with "steps" and "seconds_per_step", over this process's; a step is one of every optimizer.
    """
    result_file, last = folder / RESULT, folder / LAST
    if resume:
        check_stored(folder, settings)
    if resume and result_file.exists():
        return dict(json.loads(result_file.read_text()))
    with naming_a_full_disk(folder):
        clock = TrainingClock()
        trainer = pl.Trainer(
            logger=[TensorBoardLogger(folder, name=None, version=""), CSVLogger(folder, name="csv", version="")],
            callbacks=[clock, *callbacks, RandomState(), Saving(last, checkpoint_every, stop_at)],
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            **trainer_options,
        )
        _prepare(folder, settings, resume=resume)  # once the trainer has found no mistake in its options
        steps_before = _step_of(last) if resume and last.exists() else 0
        trainer.fit(module, data, ckpt_path=str(last) if steps_before else None)
        optimizers = len(trainer.optimizers)
        steps = (trainer.global_step - steps_before) // optimizers
        trainer.test(module, data, verbose=False)
        result = {**read_result(trainer), "steps": trainer.global_step // optimizers}
        result["seconds_per_step"] = clock.seconds / max(steps, 1)
        if trainer.is_global_zero:
            result_file.write_text(json.dumps(result, indent=2))
    return result


@rank_zero_only
def _prepare(folder: Path, settings: Mapping[str, object], *, resume: bool) -> None:
    """Make the folder, empty unless the run is to be continued."""
    if not resume and folder.exists():
        shutil.rmtree(folder)
    make_folder(folder)
    (folder / "settings.json").write_text(json.dumps(dict(settings), indent=2))


def check_stored(folder: Path, settings: Mapping[str, object]) -> None:
    """Raise if there is something to resume in the folder of a run that was made with other settings.

    Raises:
        ValueError: naming what differs.
    """
    if (folder / RESULT).exists() or (folder / LAST).exists():
        check_settings(folder / "settings.json", settings)


def check_settings(file: Path, settings: Mapping[str, object]) -> None:
    """Raise if a run was made with other settings than these.

    Raises:
        ValueError: naming what differs.
    """
    saved = json.loads(file.read_text()) if file.exists() else settings
    differing = [name for name in settings if saved.get(name) != settings[name]]
    if differing:
        changes = ", ".join(f"{name} was {saved.get(name)!r} and is {settings[name]!r}" for name in differing)
        raise ValueError(
            f"Cannot resume the run in {file.parent}: {changes}. Give the options it was made with, another"
            " --output-dir, or remove that folder to start over."
        )


def _step_of(checkpoint: Path) -> int:
    import torch

    return int(torch.load(checkpoint, map_location="cpu", weights_only=False)["global_step"])
