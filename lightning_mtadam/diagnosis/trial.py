"""Trains a copy of a module for some steps, and measures its losses beside."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lightning_mtadam.callbacks import GradientReport
from lightning_mtadam.diagnosis.advice import advise
from lightning_mtadam.diagnosis.diagnosis import Diagnosis
from lightning_mtadam.diagnosis.watch import Watch
from lightning_mtadam.terms import kind_of

STEPS = 200
REPORTS = 25
"""A trial measures in so many of its steps, evenly."""
FEWEST = 4
"""From fewer reports nothing can be said of change."""
OURS: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": -1,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "devices": 1,
}
"""Options of the trainer of a trial, which leaves nothing behind."""
REMARKS = (".*does not have many workers", ".*LeafSpec")
"""Of Lightning, on what does not matter to a trial."""


def diagnose(
    module: pl.LightningModule,
    data: Iterable[Any] | pl.LightningDataModule | None = None,
    steps: int = STEPS,
    **trainer: Any,
) -> Diagnosis:
    """Train a copy of a module for some steps, and print what its losses need.

    The copy trains as the module would, with its own optimizer. In some 25 of the steps each loss is differentiated by
    itself, as :class:`~lightning_mtadam.callbacks.GradientReport` does it. Nothing is written, and the module and the
    random number generators stay as they are. The report says how unbalanced the losses are where they meet, which of
    them pull against each other, what to do, why, and what it would cost.

    It says most about a module that trains on the plain sum with Adam, of losses without weights of your own. With
    MTAdam or a balancer the copy trains with that.

    Args:
        module: its ``training_step`` returns a dict of named losses, or calls
            :func:`~lightning_mtadam.callbacks.report_losses`; it optimizes automatically.
        data: a data loader, a list of batches or a data module; ``None``: the module's own ``train_dataloader``.
        steps: of the optimizer, at least 4. 200 show how training begins; what comes later, they do not.
        trainer: options of Lightning's Trainer that say where and how to compute, e.g. ``accelerator``, ``precision``
            or ``accumulate_grad_batches``.

    Returns:
        The diagnosis: its ``recommendation``, ``weights``, ``to_dict()``, ``to_markdown()`` and ``plot()``.

    Raises:
        TypeError: ``module`` is no LightningModule.
        MisconfigurationException: its losses have no names, or there is one alone.
        ValueError: too few steps, or no batches; manual optimization; an optimizer of other parameters.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_mtadam import MultiTermLightningModule, diagnose
        >>> class TwoUnits(MultiTermLightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        ...
        ...     def training_step(self, x, batch_idx):
        ...         near, far = (self.network(x) - x[:, :2].sin()).unbind(1)
        ...         return {"meters": far.square().mean(), "millimeters": (1000 * near).square().mean()}
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters(), lr=1e-3)
        >>> _ = torch.manual_seed(0)
        >>> batches = [torch.randn(16, 8) for _ in range(8)]
        >>> found = diagnose(TwoUnits(), batches, accelerator="cpu")  # doctest: +ELLIPSIS
        # Diagnosis: reweight
        ...
        >>> found.weights["millimeters"] < 1e-4
        True
    """
    if not isinstance(module, pl.LightningModule):
        raise TypeError(
            f"diagnose needs a LightningModule, but got {kind_of(module)}. Without Lightning, differentiate the losses"
            " yourself, and see lightning_mtadam.gradient_statistics."
        )
    with isolate_rng():
        found = try_out(copy.deepcopy(module), data, steps, trainer)
    sys.stdout.write(found.to_markdown())
    return found


def try_out(
    module: pl.LightningModule,
    data: Iterable[Any] | pl.LightningDataModule | None,
    steps: int,
    options: Mapping[str, Any],
) -> Diagnosis:
    """Train the module itself, and measure."""
    if steps < FEWEST:
        raise ValueError(f"steps must be at least {FEWEST}, but got {steps}: less says nothing about change.")
    if not module.automatic_optimization:
        raise ValueError(
            "diagnose trains by automatic optimization, but the module sets automatic_optimization = False. For a"
            " module with several optimizers add lightning_mtadam.callbacks.GradientReport to its own trainer."
        )
    module.configure_callbacks = list  # type: ignore[method-assign] # they may stop it, or write
    report = GradientReport(max(1, steps // REPORTS), layers="parameter")
    watch = Watch(report)
    with TemporaryDirectory() as folder, _quiet():
        trainer = pl.Trainer(**OURS, default_root_dir=folder, callbacks=[report, watch], max_steps=steps, **options)
        trainer.fit(module, **_given(data))
    if len(watch.found) < FEWEST:
        raise ValueError(
            f"The trial ended after {trainer.global_step} steps with {len(watch.found)} reports, of which {FEWEST} are"
            " needed. See that there are batches, that training_step does not return None, and that losses are finite."
        )
    course = watch.course()
    return Diagnosis(course, advise(course), watch.costs(), type(trainer.optimizers[0]).__name__)


def _given(data: Iterable[Any] | pl.LightningDataModule | None) -> dict[str, Any]:
    """The data, as ``fit`` takes them."""
    if isinstance(data, pl.LightningDataModule):
        return {"datamodule": data}
    if isinstance(data, list) and not any(isinstance(one, DataLoader) for one in data):
        data = DataLoader(data, batch_size=None)  # type: ignore[arg-type] # Lightning takes a list for several loaders
    return {"train_dataloaders": data}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning tells of devices, loaders and the end."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for remark in REMARKS:
                warnings.filterwarnings("ignore", message=remark)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
