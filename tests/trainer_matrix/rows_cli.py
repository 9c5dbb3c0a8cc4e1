"""LightningCLI: module, optimizer and callbacks from the command line."""

import csv
from pathlib import Path

from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightning_mtadam import MTAdam, MultiTermLightningModule
from lightning_mtadam.callbacks import BalanceWeightMonitor
from tests.lightning_models import assert_same, make_loader, make_mtadam, make_network, three_losses
from tests.loops import by_hand
from tests.trainer_matrix.table import HAND_LOOP, row

GROUP = "`LightningCLI`"
IGNORED = ["LightningCLI's args parameter is intended", "(?s).*(JSONARGPARSE_DEPRECATION_WARNINGS|deprecated in v4)"]
TERMS = ("fit", "size", "decay")
MODEL = "--model=tests.trainer_matrix.rows_cli.Configured"
OPTIMIZER = ["--optimizer=lightning_mtadam.MTAdam", "--optimizer.lr=0.01"]
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    *(f"--trainer.{name}=false" for name in ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")),
]


class Configured(MultiTermLightningModule):
    """Has data, but no optimizer: that comes from the command line."""

    def __init__(self, size_factor: float = 1.0) -> None:
        super().__init__()
        self.network = make_network()
        self.size_factor = size_factor

    def training_step(self, batch, batch_idx):
        losses = three_losses(self.network, batch)
        return {**losses, "size": self.size_factor * losses["size"]}

    def train_dataloader(self) -> DataLoader:
        return make_loader()


def run(folder: Path, *arguments: str) -> LightningCLI:
    return LightningCLI(
        subclass_mode_model=True,
        seed_everything_default=False,
        args=["fit", *QUIET, f"--trainer.default_root_dir={folder}", *arguments],
    )


@row(GROUP, "module by class path, `--optimizer`", HAND_LOOP, ignored=IGNORED)
def module_and_optimizer_come_from_the_command_line(folder: Path) -> None:
    options = [
        "--model.size_factor=10",
        f"--optimizer.terms=[{','.join(TERMS)}]",
        "--optimizer.anchor=mean",
        "--optimizer.layers=module",
        "--optimizer.betas=[0.8,0.99,0.95]",
        "--optimizer.importance={size: 0.5}",
        "--trainer.logger=false",
    ]
    cli = run(folder, MODEL, *OPTIMIZER, *options)
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, MTAdam)
    assert list(optimizer.balance_weights()) == ["network.0", "network.2"]
    chosen = {
        "terms": TERMS,
        "anchor": "mean",
        "layers": "module",
        "betas": (0.8, 0.99, 0.95),
        "importance": {"size": 0.5},
    }

    def losses(network, batch):
        found = three_losses(network, batch)
        return {**found, "size": 10 * found["size"]}

    network, _ = by_hand(lambda network: make_mtadam(network, **chosen), losses=losses)
    assert_same(cli.model.network, network)


@row(GROUP, "`--lr_scheduler`", HAND_LOOP, ignored=IGNORED)
def the_scheduler_comes_from_the_command_line(folder: Path) -> None:
    scheduler = ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"]
    cli = run(folder, MODEL, *OPTIMIZER, *scheduler, "--trainer.logger=false")
    network, _ = by_hand(make_scheduler=lambda o: StepLR(o, step_size=1, gamma=0.5), interval="epoch")
    assert_same(cli.model.network, network)
    assert list(cli.trainer.optimizers[0].balance_weights()) == [name for name, _ in cli.model.named_parameters()]


class OptimizerAsArgument(Configured):
    """Makes its optimizer by itself, with what the command line says about it."""

    def __init__(self, make_optimizer: OptimizerCallable = MTAdam) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer

    def configure_optimizers(self):
        return self.make_optimizer(self.network.named_parameters())


@row(GROUP, "an optimizer as the module's argument (`OptimizerCallable`)", HAND_LOOP, ignored=IGNORED)
def a_module_may_have_its_optimizer_as_an_argument(folder: Path) -> None:
    model = "--model=tests.trainer_matrix.rows_cli.OptimizerAsArgument"
    optimizer = ["--model.make_optimizer=lightning_mtadam.MTAdam", "--model.make_optimizer.lr=0.01"]
    cli = run(folder, model, *optimizer, "--trainer.logger=false")
    assert_same(cli.model.network, by_hand()[0])
    assert list(cli.trainer.optimizers[0].balance_weights()) == [name for name, _ in make_network().named_parameters()]


@row(GROUP, "`--trainer.callbacks+=`, `--config` of an earlier run", HAND_LOOP, ignored=IGNORED)
def callbacks_are_added_and_the_saved_configuration_repeats_the_run(folder: Path) -> None:
    callback = ["--trainer.callbacks+=lightning_mtadam.callbacks.BalanceWeightMonitor"]
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.log_every_n_steps=1"]
    cli = run(folder, MODEL, *OPTIMIZER, *callback, "--trainer.callbacks.max_series=5", *logger)
    (monitor,) = [one for one in cli.trainer.callbacks if isinstance(one, BalanceWeightMonitor)]
    assert monitor.max_series == 5
    logged = Path(cli.trainer.log_dir)
    with (logged / "metrics.csv").open() as file:
        medians = [line["balance_weight/size.median"] for line in csv.DictReader(file)]
    assert sum(map(bool, medians)) == 12
    again = run(folder, f"--config={logged / 'config.yaml'}")
    assert Path(again.trainer.log_dir) != logged
    assert_same(cli.model.network, by_hand()[0])
    assert_same(again.model.network, by_hand()[0])
