"""The guard refuses, before the first batch, what could not be right, with the reason and the alternative."""

from types import SimpleNamespace

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_mtadam.guard import Guard
from tests.lightning_models import make_mtadam, make_network, make_trainer, sgd


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


def test_a_trainer_has_one_guard_however_often_it_is_watched():
    trainer = make_trainer()
    for _ in range(3):
        Guard.watch(trainer)
    assert [type(callback) for callback in trainer.callbacks].count(Guard) == 1
