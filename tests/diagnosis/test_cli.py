"""From the command line, with a configuration that ``fit`` has saved."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

from lightning_mtadam.diagnosis.cli import DiagnosisCLI
from tests.diagnosis.test_trial import TwoHeads, fits
from tests.lightning_models import QUIET

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),
    pytest.mark.filterwarnings("ignore:(?s).*(JSONARGPARSE_DEPRECATION_WARNINGS|deprecated in v4)"),
]
OF_TRAINER = ["--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false"]


class Configured(TwoHeads):
    """Its optimizer comes from the command line.

    Args:
        factor: of the second loss.
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(lambda *given: fits(*given, factor=factor))

    configure_optimizers = TwoHeads.__mro__[1].configure_optimizers

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=16)


def test_a_saved_configuration_is_diagnosed(tmp_path, capsys):
    LightningCLI(
        subclass_mode_model=True,
        seed_everything_default=0,
        args=[
            "fit",
            f"--model={__name__}.Configured",
            "--model.factor=1e4",
            "--optimizer=torch.optim.Adam",
            "--optimizer.lr=1e-2",
            f"--trainer.default_root_dir={tmp_path}",
            *OF_TRAINER,
        ],
    )
    (config,) = tmp_path.rglob("config.yaml")
    output = tmp_path / "made" / "report.md"
    cli = DiagnosisCLI(args=["--config", str(config), "--steps=20", "--output", str(output)])
    assert cli.diagnosis.recommendation == "reweight"
    assert cli.diagnosis.optimizer == "Adam"
    assert len(cli.diagnosis.course.steps) == 20
    assert output.read_text() == cli.diagnosis.to_markdown()
    assert cli.diagnosis.to_markdown() in capsys.readouterr().out


def test_a_class_of_its_own_needs_no_class_path(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["diagnose.py", "--model.factor=1", "--optimizer=SGD", "--optimizer.lr=1e-3", "--steps=8"]
    )
    assert DiagnosisCLI(Configured).diagnosis.recommendation == "leave"
