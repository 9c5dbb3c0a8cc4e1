"""What looks for errors, for time, or at the optimizer."""

import re
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from torch.optim.lr_scheduler import OneCycleLR

from tests.lightning_models import Regression, adam, assert_same, fit, make_loader, make_mtadam, make_network
from tests.loops import by_hand
from tests.trainer_matrix.table import ADAM, row

GROUP = "Diagnosis"
ANOMALY_WARNINGS = ["Anomaly Detection has been enabled", "Error detected in"]


class Rooted(Regression):
    """A finite loss whose gradient is nan."""

    def training_step(self, batch, batch_idx):
        zero = self.network[2].bias - self.network[2].bias.detach()
        return {**super().training_step(batch, batch_idx), "root": zero.sum().sqrt() * 0}


@row(GROUP, "`detect_anomaly`", ADAM, ignored=ANOMALY_WARNINGS)
def detect_anomaly_changes_nothing_where_there_is_none(folder: Path) -> None:
    module = Regression()
    fit(module, make_loader(), detect_anomaly=True)
    assert_same(module.network, by_hand()[0])


@row(GROUP, "`detect_anomaly`", ADAM, ignored=ANOMALY_WARNINGS)
def detect_anomaly_names_the_operation_as_with_adam(folder: Path) -> None:
    messages = set()
    for make_optimizer in (make_mtadam, adam):
        module = Rooted(make_optimizer)
        with pytest.raises(RuntimeError, match="'SqrtBackward0' returned nan values") as error:
            fit(module, make_loader(), detect_anomaly=True)
        messages.add(str(error.value))
        assert_same(module.network, make_network())
    assert len(messages) == 1


def actions(profiler: Profiler, report: str) -> set[str]:
    """The names of what was profiled."""
    if isinstance(profiler, SimpleProfiler):
        return set(profiler.recorded_durations)
    if isinstance(profiler, AdvancedProfiler):
        return set(re.findall(r"^Profile stats for: (.*?)(?: rank: .*)?$", report, re.MULTILINE))
    return {event.key for event in profiler.function_events.key_averages() if event.key.startswith("[pl]")}


@row(GROUP, "profilers (simple, advanced, PyTorch)", ADAM, cases=[SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def profilers_see_what_they_see_with_adam(folder: Path, kind: type[Profiler]) -> None:
    seen = []
    for make_optimizer in (make_mtadam, adam):
        module, profiler = Regression(make_optimizer), kind(folder, make_optimizer.__name__)
        fit(module, make_loader(), profiler=profiler)
        assert_same(module.network, by_hand(make_optimizer)[0])
        seen.append(actions(profiler, (folder / f"fit-{make_optimizer.__name__}.txt").read_text()))
    assert seen[0] == seen[1]
    assert any("backward" in action for action in seen[0])
    assert any("optimizer_step" in action for action in seen[0])


@row(GROUP, "`barebones`", ADAM)
def barebones_trains_the_same_and_logs_nothing(folder: Path) -> None:
    for make_optimizer in (make_mtadam, adam):
        module = Regression(make_optimizer)
        trainer = fit(module, make_loader(), barebones=True)
        assert_same(module.network, by_hand(make_optimizer)[0])
        assert not trainer.callback_metrics


def one_cycle(optimizer):
    return {"scheduler": OneCycleLR(optimizer, max_lr=0.05, total_steps=12), "interval": "step"}


@row(GROUP, "`LearningRateMonitor`", ADAM)
def the_learning_rate_monitor_logs_rate_momentum_and_weight_decay(folder: Path) -> None:
    def logged(make_optimizer):
        monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
        module = Regression(make_optimizer, one_cycle)
        fit(module, make_loader(), callbacks=[monitor], logger=CSVLogger(folder), log_every_n_steps=1)
        found = {**monitor.lrs, **monitor.last_momentum_values, **monitor.last_weight_decay_values}
        return {name.replace("MTAdam", "Adam"): values for name, values in found.items()}

    ours, theirs = logged(make_mtadam), logged(adam)
    assert ours == theirs
    assert set(ours) == {"lr-Adam", "lr-Adam-momentum", "lr-Adam-weight_decay"}
    assert len(set(ours["lr-Adam"])) == 12
