"""The guard refuses, before the first batch, what could not be right, with the reason and the alternative."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_mtadam import MTAdam
from lightning_mtadam.balancers import MetaBalance
from lightning_mtadam.guard import Guard, TrainerGuard
from tests.lightning_models import (
    QUIET,
    Regression,
    SumRegression,
    adam,
    assert_same,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    make_trainer,
    sgd,
)


def start(strategy, world_size=1, make_optimizer=make_mtadam):
    """What the guard does when a fit under this strategy starts."""
    optimizers = [make_optimizer(make_network())]
    trainer = SimpleNamespace(world_size=world_size, strategy=strategy, optimizers=optimizers, lightning_module=None)
    Guard().on_fit_start(trainer, None)


REFUSED = {
    "FSDP1": (FSDPStrategy, r"FSDP1.*Use FSDP2: torch.distributed.fsdp.fully_shard.*ModelParallelStrategy\(\)"),
    "ddp_comm_hook": (
        lambda: DDPStrategy(ddp_comm_hook=lambda state, bucket: None),
        r"communication hook.*Leave it out",
    ),
    "DeepSpeed": (lambda: object.__new__(DeepSpeedStrategy), r"DeepSpeed runs backward.*Use strategy='ddp'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_strategy_that_cannot_work_is_refused_with_the_reason_and_the_alternative(name):
    make_strategy, message = REFUSED[name]
    with pytest.raises(MisconfigurationException, match=message):
        start(make_strategy())


@pytest.mark.parametrize("name", REFUSED)
def test_with_another_optimizer_every_strategy_is_let_be(name):
    start(REFUSED[name][0](), make_optimizer=sgd)


def test_a_strategy_of_several_processes_that_is_not_known_is_refused_by_name():
    class Unknown:
        pass

    with pytest.raises(MisconfigurationException, match=r"does not support Unknown.*Use strategy='ddp'"):
        start(Unknown(), world_size=2)


def test_a_network_of_which_nothing_is_sharded_is_refused():
    with pytest.raises(MisconfigurationException, match=r"No parameter is sharded.*Call fully_shard"):
        start(ModelParallelStrategy(), world_size=2)


class Together(torch.optim.Optimizer):
    """Steps several optimizers as one."""

    def __init__(self, *optimizers):
        super().__init__([group for one in optimizers for group in one.param_groups], {})
        self.optimizers = optimizers

    def step(self, closure):
        loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def in_parts(make_second):
    return lambda network: Together(sgd(network[0]), make_second(network[2]))


@QUIET
def test_mtadam_for_a_part_beside_another_optimizer_is_refused_with_what_to_do():
    module = Regression(in_parts(lambda network: MTAdam(network.parameters())))
    with pytest.raises(MisconfigurationException, match=r"Together holds an MTAdam.*only some.*SharedLayerBalancer"):
        fit(module, make_loader(1))
    assert_same(module.network, make_network())


@QUIET
def test_other_optimizers_that_step_as_one_are_let_be():
    module = Regression(in_parts(adam))
    fit(module, make_loader(1))
    assert not torch.equal(module.network[2].bias, make_network()[2].bias)


def test_a_trainer_has_one_guard_however_often_it_is_watched():
    trainer = make_trainer()
    for _ in range(3):
        Guard.watch(trainer)
    assert [type(callback) for callback in trainer.callbacks].count(Guard) == 1


# A balancer that nothing asks for


@pytest.fixture
def entry_point(tmp_path, monkeypatch):
    """Lightning finds the package's entry point, as it does where the package is installed."""
    (folder := tmp_path / "entry_point-0.dist-info").mkdir()
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    group = "lightning.pytorch.callbacks_factory"
    name, value = text.split(f'[project.entry-points."{group}"]\n')[1].splitlines()[0].split(" = ")
    value = value.strip('"')
    (folder / "METADATA").write_text("Name: entry_point\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return EntryPoint(name, value, group)


class WithBalancer(SumRegression):
    """A plain LightningModule."""

    def configure_balancer(self):
        return MetaBalance()


@QUIET
def test_a_balancer_of_a_plain_module_is_refused(entry_point):
    module = WithBalancer(adam)
    with pytest.raises(MisconfigurationException, match=r"WithBalancer has .*Write .*MultiTermLightningModule"):
        fit(module, make_loader())
    assert_same(module.network, make_network())


@QUIET
@pytest.mark.parametrize("make_module", [lambda: SumRegression(adam), Regression])
def test_other_modules_are_let_be(make_module, entry_point):
    trainer = fit(make_module(), make_loader())
    assert any(isinstance(callback, TrainerGuard) for callback in trainer.callbacks)


def test_trainers_get_nothing_where_no_balancer_was_imported(entry_point):
    code = f"import sys, {entry_point.module}; print({entry_point.module}.{entry_point.attr}(), *sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert found[0] == "[]"
    assert not {"lightning", "torch"} & set(found)
    assert isinstance(entry_point.load()()[0], pl.Callback)
