"""The Lightning Trainer on the accelerator, with all that goes around a step."""

from importlib.util import find_spec

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_mtadam import MultiTermLightningModule, NonFiniteError, export_weights, partitioned_losses
from lightning_mtadam.callbacks import BalanceWeightMonitor
from tests.accelerator.device import NAME, Watch
from tests.accelerator.training import DEVICE, FIRST, SECOND
from tests.balancers.cases import CASES, Balanced
from tests.lightning_models import GAN, QUIET, Regression, make_loader, make_mtadam, make_network, make_trainer

pytestmark = [QUIET, pytest.mark.filterwarnings("ignore:.*tensorboardX", "ignore:.*ACCEL available")]


class StandIn(Accelerator):
    """Lightning's view of the device."""

    def setup_device(self, device):
        torch.get_device_module(DEVICE).set_device(device)

    def get_device_stats(self, device):
        return {}

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return list(range(devices)) if isinstance(devices, int) else devices

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(DEVICE, index) for index in devices]

    @staticmethod
    def auto_device_count():
        return 2

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return DEVICE


def fit(module, there, loader=None, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    place = {"accelerator": "cpu", "devices": 1}
    if there:
        device = torch.device(NAME, 1)
        place = {"strategy": SingleDeviceStrategy(device, StandIn())}
        if DEVICE != NAME:
            place = {"accelerator": DEVICE, "devices": 1}
    trainer = pl.Trainer(**{**place, "max_epochs": 2, **quiet, **options})
    trainer.fit(module, make_loader() if loader is None else loader)
    assert trainer.strategy.root_device.type == (DEVICE if there else "cpu")
    return trainer


def assert_same(first, second, tolerance=1e-12):
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine.detach().cpu(), theirs.detach().cpu(), rtol=tolerance, atol=tolerance)


FLAGS = [
    {},
    {"accumulate_grad_batches": 3},
    {"gradient_clip_val": 0.05},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"callbacks": [GradientAccumulationScheduler({0: 2, 1: 3})]},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags) or "none")
@pytest.mark.parametrize("options", [{}, {"balance_every": 3}, {"denominator": "own"}, {"anchor": "mean"}], ids=str)
def test_the_trainer_gives_the_numbers_of_the_host(flags, options):
    modules = [Regression(lambda network: make_mtadam(network, **options)) for _ in range(2)]
    for module, there in zip(modules, (False, True), strict=True):
        fit(module, there, **flags)
    assert_same(*modules)


def test_the_trainer_with_low_memory():
    modules = [Regression(lambda network: make_mtadam(network, low_memory=True)) for _ in range(2)]
    for module, there in zip(modules, (False, True), strict=True):
        fit(module, there)
    assert_same(*modules)


def test_two_optimizers_under_manual_optimization():
    modules = [GAN(), GAN()]
    for module, there in zip(modules, (False, True), strict=True):
        fit(module, there)
    assert_same(*modules)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_trainer_with_every_balancer(case):
    modules = [Balanced(case), Balanced(case)]
    for module, there in zip(modules, (False, True), strict=True):
        fit(module, there)
    assert_same(*modules, tolerance=1e-9)


@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16(mixed):
    modules = [Regression(make_mtadam, dtype=torch.float32) for _ in range(2)]
    data = make_loader(dtype=torch.float32 if mixed else torch.bfloat16)
    for module, there in zip(modules, (False, True), strict=True):
        device = DEVICE if there else "cpu"
        fit(
            module, there, data, plugins=[MixedPrecision("bf16-mixed", device) if mixed else HalfPrecision("bf16-true")]
        )
    assert_same(*modules, tolerance=0.05)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_from_the_other_device(tmp_path):
    whole, first, resumed = Regression(), Regression(), Regression()
    fit(whole, False, max_epochs=4)
    saver = ModelCheckpoint(tmp_path, filename="last", save_top_k=1)
    fit(first, True, max_epochs=2, enable_checkpointing=True, callbacks=[saver])
    make_trainer(max_epochs=4).fit(resumed, make_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(resumed, whole)


class Spoiled(Regression):
    """The gradient of its last batch is inf."""

    def training_step(self, batch, batch_idx):
        losses = super().training_step(batch, batch_idx)
        if batch_idx == 5 and self.current_epoch == 1:
            weight = self.network[0].weight
            losses["size"] = losses["size"] + (weight - weight.detach()).abs().sqrt().sum()  # 0, with a gradient of nan
        return losses


@pytest.mark.parametrize("options", [{}, {"balance_every": 3}], ids=str)
def test_a_last_step_that_is_not_finite_is_told_before_the_end_of_fit(options):
    with pytest.raises(NonFiniteError, match=r"size|sum of the terms"):
        fit(Spoiled(lambda network: make_mtadam(network, **options)), True)


def test_a_last_step_that_is_not_finite_is_told_before_it_is_saved(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=12)
    with pytest.raises(NonFiniteError):
        fit(Spoiled(), True, enable_checkpointing=True, callbacks=[saver])
    assert not list(tmp_path.glob("*.ckpt"))


class Waits(pl.Callback):
    """In which batches, of all, the host waited for a number; from when a batch was there until it was logged."""

    def __init__(self):
        self.watch, self.batches = None, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.close()
        self.watch = Watch()
        self.watch.__enter__()

    def on_train_epoch_end(self, trainer, pl_module):
        self.close()

    def close(self):
        if self.watch is not None:
            self.watch.__exit__()
            self.batches.append(any(kind in ("item", "d2h") for kind, _, _ in self.watch.waits))
            self.watch = None


@pytest.mark.skipif(DEVICE != NAME, reason="waits are counted on the stand-in")
@pytest.mark.parametrize("automatic", [True, False])
def test_the_host_waits_for_what_is_logged_where_the_trainer_logs_only(automatic, tmp_path):
    class Manual(Regression):
        def training_step(self, batch, batch_idx):
            losses = super().training_step(batch, batch_idx)
            if self.automatic_optimization:
                return losses
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.backward_terms(losses, optimizer)
            optimizer.step()
            return None

    waits, module = Waits(), Manual()
    module.automatic_optimization = automatic
    logger = CSVLogger(tmp_path)
    trainer = fit(module, True, callbacks=[waits], logger=logger, log_every_n_steps=3, max_epochs=2)
    first, second = waits.batches[:6], waits.batches[6:]
    assert second == [False, False, True] * 2
    assert first[3:] == [False, False, True], "the first steps make what is kept"
    shown = trainer.progress_bar_metrics
    assert shown == {name: pytest.approx(float(trainer.callback_metrics[f"train/{name}"])) for name in shown}
    assert shown


@pytest.mark.parametrize("default", [None, FIRST, pytest.param(SECOND, marks=pytest.mark.two_devices)])
def test_weights_are_logged(tmp_path, default):
    modules = [Regression(), Regression()]
    torch.set_default_device(default)
    rows = []
    for module, there in zip(modules, (False, True), strict=True):
        with torch.device("cpu"):
            module.network = make_network()
            data = make_loader()
            loggers = [CSVLogger(tmp_path / str(there))]
            if find_spec("tensorboard"):
                loggers.append(TensorBoardLogger(tmp_path / f"{there}board"))
        fit(module, there, data, logger=loggers, callbacks=[BalanceWeightMonitor()], log_every_n_steps=2)
        (file,) = (tmp_path / str(there)).rglob("metrics.csv")
        rows.append(file.read_text().splitlines())
    assert rows[0][0] == rows[1][0]
    assert len(rows[0]) == len(rows[1]) > 3


def test_a_balancer_and_its_weights_export(tmp_path):
    case = CASES["gradnorm"]
    found = []
    for there in (False, True):
        module = Balanced(case)
        fit(module, there)
        found.append(export_weights(module.balancer))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-9)


def test_weights_of_mtadam_export():
    found = []
    for there in (False, True):
        module = Regression()
        trainer = fit(module, there)
        torch.set_default_device(DEVICE if there else None)
        found.append(export_weights(trainer.optimizers[0]))
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-9)


class Partitioned(MultiTermLightningModule):
    """A loss for each kind of rows."""

    def __init__(self):
        super().__init__()
        self.network = make_network()

    def training_step(self, batch, batch_idx):
        x, y = batch
        kinds = torch.arange(len(x), device=x.device) % 3

        def errors(inputs, targets):
            return (self.network(inputs) - targets).square().mean(1)

        return partitioned_losses(errors, (x, y), kinds, ("a", "b", "c"))

    def configure_optimizers(self):
        return make_mtadam(self.network, anchor="mean")


def test_partitioned_losses():
    modules = [Partitioned(), Partitioned()]
    for module, there in zip(modules, (False, True), strict=True):
        fit(module, there)
    assert_same(*modules)
