"""Accumulation and clipping."""

import math
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from tests.lightning_models import (
    GAN,
    Regression,
    adam,
    assert_same,
    assert_same_state,
    fit,
    largest_difference,
    make_loader,
    make_mtadam,
)
from tests.loops import by_hand, hand_loop
from tests.trainer_matrix.table import HAND_LOOP, REFUSED, row

GROUP = "Gradients"


@row(GROUP, "`accumulate_grad_batches`", HAND_LOOP, cases=[(3, 8), (3, 10), (4, 8), (4, 10)])
def accumulation_balances_the_accumulated_gradient_also_of_a_last_incomplete_group(
    folder: Path, accumulate: int, batches: int
) -> None:
    module = Regression()
    trainer = fit(module, make_loader(batches), accumulate_grad_batches=accumulate)
    network, optimizer = by_hand(batches=make_loader(batches), accumulate=accumulate)
    assert trainer.global_step == 2 * math.ceil(batches / accumulate)
    assert_same(module.network, network)
    assert_same_state(trainer.optimizers[0], optimizer)


@row(GROUP, "`GradientAccumulationScheduler`", HAND_LOOP)
def accumulation_may_change_between_epochs(folder: Path) -> None:
    module = Regression()
    fit(module, make_loader(), callbacks=[GradientAccumulationScheduler({0: 1, 1: 4})])
    network, optimizer = by_hand(epochs=1)
    hand_loop(network, optimizer, make_loader(), epochs=1, accumulate=4)
    assert_same(module.network, network)


def with_visible_clipping(network):
    """An eps of the gradients' order: Adam would otherwise hide that all gradients were scaled by one factor."""
    return make_mtadam(network, eps=1e-2)


@row(
    GROUP,
    "`gradient_clip_val` by norm and by value",
    HAND_LOOP,
    cases=[("norm", 1e-3, 1), ("norm", 1e-3, 4), ("value", 1e-4, 1), ("value", 1e-4, 4)],
)
def clipping_acts_on_the_balanced_gradient(folder: Path, algorithm: str, limit: float, accumulate: int) -> None:
    module = Regression(with_visible_clipping)
    options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": accumulate}
    fit(module, make_loader(), **options)
    network, _ = by_hand(with_visible_clipping, clip=(limit, algorithm), accumulate=accumulate)
    unclipped, _ = by_hand(with_visible_clipping, accumulate=accumulate)
    assert_same(module.network, network)
    assert largest_difference(module.network, unclipped) > 1e-3


@row(GROUP, "`gradient_clip_val` by norm and by value", HAND_LOOP)
def clipping_is_by_norm_unless_told_otherwise(folder: Path) -> None:
    module = Regression()
    fit(module, make_loader(), gradient_clip_val=1e-3)
    assert_same(module.network, by_hand(clip=(1e-3, "norm"))[0])


@row(GROUP, "`gradient_clip_val` by norm and by value", HAND_LOOP)
def a_clip_value_of_zero_clips_nothing(folder: Path) -> None:
    module = Regression()
    fit(module, make_loader(), gradient_clip_val=0)
    assert_same(module.network, by_hand()[0])


@row(
    "Refused",
    "`accumulate_grad_batches` and `gradient_clip_val` under manual optimization (by Lightning)",
    REFUSED,
    cases=[("accumulate_grad_batches", 2), ("gradient_clip_val", 1.0)],
)
def manual_optimization_refuses_what_is_automatic(folder: Path, option: str, value: float) -> None:
    messages = set()
    for make_optimizer in (make_mtadam, adam):
        with pytest.raises(MisconfigurationException, match="is not supported for manual optimization") as error:
            fit(GAN(make_optimizer), make_loader(), **{option: value})
        messages.add(str(error.value))
    assert len(messages) == 1
