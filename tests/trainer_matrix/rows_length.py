"""How long a run is."""

from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer

from tests.lightning_models import (
    Regression,
    assert_same,
    assert_same_state,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    make_trainer,
)
from tests.loops import by_hand, hand_loop
from tests.trainer_matrix.table import HAND_LOOP, row

GROUP = "Length of the run"


@row(GROUP, "`EarlyStopping` on `train/loss`", HAND_LOOP, cases=[("min", 3), ("max", 2), ("max", 99)])
def early_stopping_monitors_the_loss(folder: Path, mode: str, patience: int) -> None:
    stopping = EarlyStopping("train/loss", mode=mode, patience=patience, check_on_train_epoch_end=True)
    module = Regression()
    trainer = fit(module, make_loader(), max_epochs=7, callbacks=[stopping])

    network = make_network()
    optimizer, sign, best, waited, epochs = make_mtadam(network), 1 if mode == "min" else -1, float("inf"), 0, 0
    while epochs < 7 and waited < patience:
        loss = sign * sum(hand_loop(network, optimizer, make_loader(), epochs=1)[-1].values())
        best, waited, epochs = min(best, loss), 0 if loss < best else waited + 1, epochs + 1
    assert trainer.current_epoch == epochs
    assert_same(module.network, network)


def let_every_batch_take_a_second(trainer: pl.Trainer) -> None:
    """For the trainer's timer."""
    (timer,) = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    timer.time_elapsed = lambda stage="train": trainer.global_step


@row(GROUP, "`Timer`, `max_time`", HAND_LOOP, cases=[("max_time", 8), ("step", 8), ("epoch", 12)])
def a_timer_stops_after_the_batch_or_the_epoch(folder: Path, kind: str, batches: int) -> None:
    duration = timedelta(seconds=8)
    options = {"max_time": duration} if kind == "max_time" else {"callbacks": Timer(duration, interval=kind)}
    module, trainer = Regression(), make_trainer(max_epochs=9, **options)
    let_every_batch_take_a_second(trainer)
    trainer.fit(module, make_loader())
    assert trainer.global_step == batches
    assert_same(module.network, by_hand(batches=[*make_loader(), *make_loader()][:batches], epochs=1)[0])


@row(GROUP, "`max_steps`", HAND_LOOP, cases=[1, 2])
def max_steps_counts_steps_not_batches(folder: Path, accumulate: int) -> None:
    module = Regression()
    trainer = fit(module, make_loader(), max_epochs=-1, max_steps=8 // accumulate, accumulate_grad_batches=accumulate)
    assert trainer.global_step == 8 // accumulate
    network, optimizer = by_hand(epochs=1, accumulate=accumulate)
    hand_loop(network, optimizer, list(make_loader())[:2], epochs=1, accumulate=accumulate)
    assert_same(module.network, network)


def first(batches: int) -> list:
    return list(make_loader())[:batches]


@row(GROUP, "`limit_train_batches`", HAND_LOOP, cases=[4, 0.67])
def limit_train_batches_trains_on_the_first_batches(folder: Path, limit: float) -> None:
    module = Regression()
    trainer = fit(module, make_loader(), limit_train_batches=limit, accumulate_grad_batches=3)
    network, optimizer = by_hand(batches=first(4), accumulate=3)
    assert_same(module.network, network)
    assert_same_state(trainer.optimizers[0], optimizer)


@row(GROUP, "`overfit_batches`", HAND_LOOP)
def overfit_batches_trains_on_the_same_few_batches(folder: Path) -> None:
    module = Regression()
    fit(module, make_loader(), overfit_batches=2, max_epochs=3)
    assert_same(module.network, by_hand(batches=first(2), epochs=3)[0])


@row(GROUP, "`fast_dev_run`", HAND_LOOP)
def fast_dev_run_takes_that_many_steps(folder: Path) -> None:
    module = Regression()
    trainer = fit(module, make_loader(), fast_dev_run=3)
    assert trainer.global_step == 3
    assert_same(module.network, by_hand(batches=first(3), epochs=1)[0])
