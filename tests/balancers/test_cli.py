"""Every balancer can be given on LightningCLI's command line, as an argument of the module."""

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torchjd.aggregation import UPGrad
from torchjd.scalarization import FAMO

from lightning_mtadam import MultiTermLightningModule, balancers
from lightning_mtadam.balancers import Balancer
from tests.balancers.cases import Case, balanced_by_hand, output_losses
from tests.lightning_models import LR, QUIET, assert_same, make_loader, make_network

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings(
        "ignore:LightningCLI's args parameter is intended",
        "ignore:(?s).*(JSONARGPARSE_DEPRECATION_WARNINGS|deprecated in v4)",
    ),
]
GIVEN = {
    "FixedWeights": {"weights": {"fit": 1.0, "size": 0.01, "bend": 3.0}},
    "GradNorm": {"shared": "network.0", "alpha": 0.5, "initial_losses": {"fit": 1.0, "size": 80.0, "bend": 1e-3}},
    "MetaBalance": {"relax": 0.5, "anchor": "mean"},
    "OutputBalancer": {"output": "network", "weights": {"fit": 2.0, "size": 1.0, "bend": 1.0}, "ema_decay": 0.9},
    "ScalarizerBalancer": {
        "scalarizer": {"class_path": "torchjd.scalarization.FAMO", "init_args": {"shape": 3}},
        "seed": 3,
    },
    "SharedLayerBalancer": {"shared": "network.0", "anchor": "size", "importance": {"bend": 0.5}, "decay": 0.5},
    "TorchJDBalancer": {"aggregator": {"class_path": "torchjd.aggregation.UPGrad"}, "seed": 3},
    "UncertaintyWeighting": {"terms": ["fit", "size", "bend"]},
}


class Configured(MultiTermLightningModule):
    """Takes its balancer, and its optimizer, from the command line."""

    def __init__(self, balancer: Balancer | None = None) -> None:
        super().__init__()
        self.network, self.balancer = make_network(), balancer

    def training_step(self, batch, batch_idx):
        return output_losses(self.network, batch)

    def train_dataloader(self):
        return make_loader()


def run(folder, *arguments):
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet = [*(f"--trainer.{name}=false" for name in off), "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]
    adam = ["--optimizer=torch.optim.Adam", f"--optimizer.lr={LR}", f"--trainer.default_root_dir={folder}"]
    return LightningCLI(Configured, seed_everything_default=False, args=["fit", *quiet, *adam, *arguments])


@pytest.mark.parametrize("name", GIVEN)
def test_the_balancer_comes_from_a_config_file(name, tmp_path):
    (tmp_path / "balanced.yaml").write_text(
        f"model:\n  balancer:\n    class_path: lightning_mtadam.balancers.{name}\n    init_args: {GIVEN[name]}\n"
    )
    cli = run(tmp_path, f"--config={tmp_path / 'balanced.yaml'}")
    kind = getattr(balancers, name)
    assert type(cli.model.balancer) is kind
    made = {"aggregator": UPGrad(), "scalarizer": FAMO(3)}
    given = {key: made.get(key, value) for key, value in GIVEN[name].items()}
    by_hand = balanced_by_hand(Case(lambda: kind(**given), output_losses), make_loader(), epochs=2)
    assert_same(cli.model, by_hand)


def test_options_of_the_balancer_come_from_the_command_line(tmp_path):
    cli = run(tmp_path, "--model.balancer=GradNorm", "--model.balancer.shared=network.0", "--model.balancer.lr=0.1")
    assert (cli.model.balancer.shared, cli.model.balancer.lr) == ("network.0", 0.1)


def test_a_balancer_that_learns_needs_no_options(tmp_path):
    cli = run(tmp_path, "--model.balancer=UncertaintyWeighting")
    assert_same(
        cli.model, balanced_by_hand(Case(balancers.UncertaintyWeighting, output_losses), make_loader(), epochs=2)
    )


def test_without_a_balancer_the_plain_sum_is_trained(tmp_path):
    cli = run(tmp_path)
    assert cli.model.balancer is None
    assert isinstance(cli.trainer.optimizers[0], torch.optim.Adam)


def test_every_balancer_is_tried():
    made = {"Balancer", "GradientBalancer", "Batch", "StepGradients"}  # what balancers are made of
    assert {*GIVEN, *made} == set(balancers.__all__)


def test_what_is_no_balancer_is_refused():
    with pytest.raises(TypeError, match=r"a balancer of lightning_mtadam\.balancers or None, but got a str"):
        Configured("GradNorm")
