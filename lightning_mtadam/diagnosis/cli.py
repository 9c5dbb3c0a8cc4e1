"""``LightningCLI`` that diagnoses what it would train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_mtadam.diagnosis.diagnosis import Diagnosis
from lightning_mtadam.diagnosis.trial import STEPS, try_out

ONLY_OF_FIT = ("ckpt_path", "weights_only", "return_predictions", "verbose")
"""Keys that a configuration of ``fit`` may have beside those of the classes."""
OF_TRAINER = ("accelerator", "precision")
"""What a trial takes from the configuration of the trainer: where and how to compute."""


class DiagnosisCLI(LightningCLI):
    """Diagnose the module of a command line, or of a configuration that ``fit`` has saved.

    It has the arguments of :class:`~lightning.pytorch.cli.LightningCLI`, which makes module, data and optimizer. Of the
    trainer it takes the accelerator and the precision: callbacks, loggers and strategies are not used. There are two
    arguments more, ``--steps``, of the trial, and ``--output``, a Markdown file for the report.

    Args:
        model_class: as of ``LightningCLI``; ``None``: any, by its class path.
        datamodule_class: as of ``LightningCLI``; ``None``: any, by its class path, or the module's own data.
        kwargs: more for ``LightningCLI``.

    Attributes:
        diagnosis: what was found.

    Example:
        In a file ``diagnose.py`` beside one that ends in ``LightningCLI(Autoencoder)``::

            DiagnosisCLI(Autoencoder)

        and then ``python diagnose.py --config lightning_logs/version_0/config.yaml``.
    """

    diagnosis: Diagnosis

    def __init__(
        self,
        model_class: type[pl.LightningModule] | None = None,
        datamodule_class: type[pl.LightningDataModule] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("seed_everything_default", 0)
        super().__init__(model_class, datamodule_class, run=False, save_config_callback=None, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is the diagnosis' own, and what it leaves out of a configuration of ``fit``."""
        parser.add_argument("--steps", type=int, default=STEPS, help="how many steps to train for")
        parser.add_argument("--output", type=Path | None, default=None, help="a Markdown file for the report")
        for name in ONLY_OF_FIT:
            parser.add_argument(f"--{name}", type=Any, default=None, help="of fit; not used")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Train for some steps, on the module itself: it was made for that."""
        configured = self._get(self.config_init, "trainer", default={})
        options = {name: configured[name] for name in OF_TRAINER if configured.get(name) is not None}
        self.diagnosis = try_out(self.model, self.datamodule, self.config["steps"], options)
        sys.stdout.write(self.diagnosis.to_markdown())
        output = self.config["output"]
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(self.diagnosis.to_markdown())
        trainer: pl.Trainer = self.model.trainer
        return trainer
