"""Schedulers, and what finds the learning rate."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning_utilities.core.imports import RequirementCache
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from tests.lightning_models import (
    LR,
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

GROUP = "Learning rate, averages"
TERMS = ("fit", "size", "decay")


def halve(optimizer):
    return StepLR(optimizer, step_size=1, gamma=0.5)


@row(GROUP, "schedulers by step and by epoch", HAND_LOOP, cases=[("step", 1), ("epoch", 1), ("step", 4)])
def schedulers_step_as_in_the_hand_written_loop(folder: Path, interval: str, accumulate: int) -> None:
    module = Regression(make_schedule=lambda optimizer: {"scheduler": halve(optimizer), "interval": interval})
    trainer = fit(module, make_loader(), accumulate_grad_batches=accumulate)
    network, optimizer = by_hand(make_scheduler=halve, interval=interval, accumulate=accumulate)
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < LR
    assert_same(module.network, network)


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=12)


class BetasSeen(pl.Callback):
    """The betas after every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(trainer.optimizers[0].param_groups[0]["betas"])


@row(GROUP, "`OneCycleLR`", HAND_LOOP)
def one_cycle_lr_cycles_the_first_beta_and_keeps_the_other_two(folder: Path) -> None:
    betas = BetasSeen()
    module = Regression(make_schedule=lambda optimizer: {"scheduler": one_cycle(optimizer), "interval": "step"})
    fit(module, make_loader(), callbacks=[betas])
    assert_same(module.network, by_hand(make_scheduler=one_cycle)[0])
    assert {tuple(others) for _, *others in betas.seen} == {(0.999, 0.9)}
    assert len({beta1 for beta1, _, _ in betas.seen}) > 3


def on_plateau(optimizer):
    """Waits for the loss to rise: it lowers the rate whenever the loss falls."""
    return ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.1)


@row(GROUP, "`ReduceLROnPlateau` on `train/loss`", HAND_LOOP)
def reduce_on_plateau_monitors_the_logged_loss(folder: Path) -> None:
    schedule = {"monitor": "train/loss", "interval": "epoch"}
    module = Regression(make_schedule=lambda optimizer: {"scheduler": on_plateau(optimizer), **schedule})
    trainer = fit(module, make_loader(), max_epochs=4)
    network = make_network()
    optimizer = make_mtadam(network)
    scheduler = on_plateau(optimizer)
    for _ in range(4):
        scheduler.step(sum(hand_loop(network, optimizer, make_loader(), epochs=1)[-1].values()))
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < LR
    assert_same(module.network, network)


class WithRate(Regression):
    """Has the learning rate as an attribute, which the finder may set."""

    def __init__(self, terms: tuple[str, ...] | None = None) -> None:
        super().__init__(lambda network: make_mtadam(network, lr=self.lr, terms=terms))
        self.lr = LR


@row(GROUP, "`lr_find`, `LearningRateFinder`", HAND_LOOP, cases=[(None,), (TERMS,)])
def the_learning_rate_finder_finds_a_suggestion_and_leaves_no_trace(
    folder: Path, terms: tuple[str, ...] | None
) -> None:
    module, loader = WithRate(terms), make_loader(30)
    trainer = make_trainer(default_root_dir=folder, max_epochs=1)
    finder = Tuner(trainer).lr_find(module, loader, num_training=25, min_lr=1e-5, max_lr=0.1, update_attr=False)
    assert len(finder.results["loss"]) == 25
    assert 1e-5 < finder.suggestion() < 0.1
    assert_same(module.network, make_network())
    trainer.fit(module, loader)
    network, optimizer = by_hand(batches=loader, epochs=1)
    assert_same(module.network, network)
    trained = copy.deepcopy(trainer.optimizers[0])
    for group in trained.param_groups:
        group.pop("initial_lr", None)  # the finder's scheduler's
    assert_same_state(trained, optimizer)


@row(GROUP, "`lr_find`, `LearningRateFinder`", HAND_LOOP)
def the_learning_rate_finder_as_a_callback_sets_the_rate_of_the_run(folder: Path) -> None:
    if not RequirementCache("lightning>=2.5.6"):
        pytest.skip("before, Lightning may go on at the old rate and within the epoch, with any optimizer")
    module, finder = WithRate(), LearningRateFinder(num_training_steps=25, min_lr=1e-5, max_lr=0.1)
    fit(module, make_loader(30), max_epochs=1, default_root_dir=folder, callbacks=[finder])
    assert module.lr == finder.optimal_lr.suggestion() != LR
    assert_same(module.network, by_hand(lambda n: make_mtadam(n, lr=module.lr), batches=make_loader(30), epochs=1)[0])
