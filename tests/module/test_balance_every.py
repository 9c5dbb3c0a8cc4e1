"""MTAdam(balance_every=k) under the Trainer does what the hand-written loop does."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mtadam.callbacks import BalanceWeightMonitor
from tests.lightning_models import (
    GAN,
    QUIET,
    MemoryLogger,
    Regression,
    StepwiseRegression,
    assert_same,
    assert_same_state,
    fit,
    half_precision,
    largest_difference,
    make_loader,
    make_mtadam,
    make_network,
    make_trainer,
    needs_exact_resume,
)
from tests.loops import by_hand, gan_by_hand
from tests.oracles.naive_balance_every import measured_steps
from tests.trainer_matrix.rows_precision import scaled_by_hand, single_precision

pytestmark = QUIET

BATCHES = 12
"""In two epochs, 24 steps, of which 11 are measured."""

seldom = partial(make_mtadam, balance_every=5)


@pytest.mark.parametrize("clip", [None, (0.05, "norm"), (0.01, "value")])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_trainer_equals_the_hand_loop(accumulate, clip):
    make = partial(seldom, eps=1e-2)
    module = Regression(make)
    limit, algorithm = clip or (None, None)
    trainer = fit(
        module,
        make_loader(4 * BATCHES),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
    )
    network, optimizer = by_hand(make, batches=make_loader(4 * BATCHES), accumulate=accumulate, clip=clip)
    assert_same(module.network, network)
    assert_same_state(trainer.optimizers[0], optimizer)
    every_step, _ = by_hand(partial(make_mtadam, eps=1e-2), batches=make_loader(4 * BATCHES), accumulate=accumulate)
    assert largest_difference(network, every_step) > 1e-3


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_float16_with_a_scaler_equals_the_hand_loop(accumulate, clip):
    module, _ = single_precision(make_optimizer=seldom)
    loader = make_loader(BATCHES * accumulate, torch.float32)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer = fit(module, loader, plugins=[half_precision(16.0)], **options)
    network, optimizer = scaled_by_hand(half_precision(16.0).scaler, seldom, loader, accumulate, clip)
    assert_same(module.network, network)
    assert_same_state(trainer.optimizers[0], optimizer)
    single, _ = single_precision(make_optimizer=seldom)
    fit(single, loader, **options)
    assert 0 < largest_difference(network, single.network) < 5e-3


def test_steps_that_the_scaler_skips_are_as_if_they_had_not_been():
    """The first scale is too large: the first steps overflow, and are measured when they succeed."""
    module, _ = single_precision(make_optimizer=seldom)
    loader = make_loader(BATCHES, torch.float32)
    growing = {"growth_interval": 5, "growth_factor": 4.0}
    trainer = fit(module, loader, plugins=[half_precision(2.0**14, **growing)])
    network, optimizer = scaled_by_hand(half_precision(2.0**14, **growing).scaler, seldom, loader)
    assert_same(module.network, network)
    assert_same_state(trainer.optimizers[0], optimizer)
    steps = optimizer.param_groups[0]["steps"]
    assert 6 < steps < 2 * BATCHES
    assert optimizer.state[network[0].weight]["step"][0] == steps
    measured = len(measured_steps(5, steps))
    assert optimizer.state[network[0].weight]["gradient_norm_count"].tolist() == [measured] * 3


@needs_exact_resume
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("at", [5, 7, 8, 16])
def test_resume_continues_bitwise_also_between_two_measurements(at, tmp_path):
    whole, resumed = StepwiseRegression(seldom), StepwiseRegression(seldom)
    options = {"max_steps": 24, "max_epochs": -1, "enable_checkpointing": True}
    trainers = [
        make_trainer(
            callbacks=[ModelCheckpoint(tmp_path / run, "{step}", every_n_train_steps=at, save_top_k=-1)], **options
        )
        for run in ("first", "second")
    ]
    trainers[0].fit(whole, make_loader())
    trainers[1].fit(resumed, make_loader(), ckpt_path=tmp_path / "first" / f"step={at}.ckpt")
    assert_same(resumed.network, whole.network)
    assert_same_state(*(trainer.optimizers[0] for trainer in trainers))
    assert trainers[1].optimizers[0].param_groups[0]["steps"] == 24


def test_the_monitor_logs_the_last_measured_balance_between_measurements():
    logger = MemoryLogger()
    module = Regression(seldom)
    fit(module, make_loader(BATCHES), logger=logger, log_every_n_steps=1, callbacks=[BalanceWeightMonitor()])
    found = [metrics for _, metrics in logger.rows if "balance_weight/size.median" in metrics]
    assert len(found) == 2 * BATCHES
    values = [metrics["balance_weight/size.median"] for metrics in found]
    moved = [step for step in range(2 * BATCHES) if step == 0 or values[step] != values[step - 1]]
    assert moved == measured_steps(5, 2 * BATCHES)
    assert set(found[0]) >= {f"balance_weight/{term}.median" for term in ("fit", "size", "decay")}


def test_in_manual_optimization_each_optimizer_has_its_own_measurements():
    module = GAN(seldom)
    fit(module, make_loader())
    for ours, theirs in zip((module.generator, module.discriminator), gan_by_hand(seldom), strict=True):
        assert_same(ours, theirs)
    assert largest_difference(module.generator, gan_by_hand()[0]) > 1e-4


def test_the_network_learns():
    assert largest_difference(by_hand(seldom)[0], make_network()) > 0.01
