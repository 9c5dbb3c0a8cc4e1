"""Number formats, each against a loop that casts by hand."""

from pathlib import Path

import torch

from tests.lightning_models import (
    Regression,
    assert_same,
    assert_same_state,
    fit,
    half_precision,
    largest_difference,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
)
from tests.loops import by_hand, hand_loop
from tests.trainer_matrix.table import HAND_LOOP, row

GROUP = "Precision"
SINGLE = torch.float32


def single_precision(**options):
    """A module and data in single precision, for the Trainer to cast."""
    return Regression(dtype=SINGLE, **options), make_loader(dtype=SINGLE)


@row(
    GROUP,
    "64-true, bf16-true, 16-true",
    HAND_LOOP,
    cases=[("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)],
)
def parameters_of_another_precision(folder: Path, precision: str, dtype: torch.dtype) -> None:
    module, loader = single_precision()
    trainer = fit(module, loader, precision=precision)
    network = make_network(SINGLE).to(dtype)
    optimizer = make_mtadam(network)
    hand_loop(network, optimizer, [[part.to(dtype) for part in batch] for batch in loader])
    assert_same(module.network, network)
    assert_same_state(trainer.optimizers[0], optimizer)
    assert next(module.parameters()).dtype == dtype


def under_autocast(dtype: torch.dtype):
    def losses(network, batch):
        with torch.autocast("cpu", dtype, cache_enabled=False):
            return three_losses(network, batch)

    return losses


@row(GROUP, "bf16-mixed", HAND_LOOP, cases=[1, 4])
def bfloat16_autocast(folder: Path, accumulate: int) -> None:
    module, loader = single_precision()
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    fit(module, loader, precision="bf16-mixed", **options)
    network, _ = by_hand(
        batches=loader, dtype=SINGLE, losses=under_autocast(torch.bfloat16), accumulate=accumulate, clip=(1.0, "norm")
    )
    assert_same(module.network, network)
    assert largest_difference(network, by_hand(batches=loader, dtype=SINGLE)[0]) > 0


def scaled_by_hand(scaler: torch.amp.GradScaler, make_optimizer, batches, accumulate=1, clip=None):
    """The hand-written loop with float16 and a gradient scaler."""
    network, batches = make_network(SINGLE), list(batches)
    optimizer, losses = make_optimizer(network), under_autocast(torch.float16)
    for _ in range(2):
        for index, batch in enumerate(batches):
            if index % accumulate == 0:
                optimizer.zero_grad()
            scale = scaler.scale(torch.ones(()))
            optimizer.backward(losses(network, batch), grad_output=scale / accumulate, loss_scale=scale)
            if (index + 1) % accumulate and index + 1 < len(batches):
                continue
            scaler.unscale_(optimizer)
            if clip is not None:
                optimizer.clip_gradients(clip)
            scaler.step(optimizer)
            scaler.update()
    return network, optimizer


def near_single_precision(network, optimizer, reference) -> bool:
    """Whether parameters and balance weights are those of a run in single precision, but for the noise of float16."""
    module, trainer = reference
    weights, expected = optimizer.balance_weights(), trainer.optimizers[0].balance_weights()
    for layer in expected:
        torch.testing.assert_close(weights[layer], expected[layer], rtol=1e-2, atol=1e-4, equal_nan=True)
    return 0 < largest_difference(network, module.network) < 2e-3


def large_eps(network):
    """With an eps that makes the size of the gradients matter."""
    return make_mtadam(network, eps=1e-2)


@row(
    GROUP,
    "16-mixed with a `GradScaler`, whatever its scale",
    HAND_LOOP,
    cases=[(o, accumulate, clip) for o in (make_mtadam, large_eps) for accumulate in (1, 4) for clip in (None, 1e-3)],
)
def float16_autocast_with_a_scaler(folder: Path, make_optimizer, accumulate: int, clip: float | None) -> None:
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    module, loader = single_precision(make_optimizer=make_optimizer)
    trainer = fit(module, loader, plugins=[half_precision(16.0)], **options)
    scaler = half_precision(16.0).scaler
    network, optimizer = scaled_by_hand(scaler, make_optimizer, loader, accumulate, clip)
    assert_same(module.network, network)
    assert_same_state(trainer.optimizers[0], optimizer)
    single, _ = single_precision(make_optimizer=make_optimizer)
    assert near_single_precision(network, optimizer, (single, fit(single, loader, **options)))


@row(GROUP, "16-mixed with a `GradScaler`, whatever its scale", HAND_LOOP, cases=[1, 2])
def growth_of_the_scale_does_not_move_the_trajectory(folder: Path, accumulate: int) -> None:
    growing = {"growth_interval": 2, "growth_factor": 2.0}
    options = {"accumulate_grad_batches": accumulate}
    (grown, loader), (constant, _) = single_precision(), single_precision()
    trainer = fit(grown, loader, plugins=[half_precision(1.0, **growing)], **options)
    other = fit(constant, loader, plugins=[half_precision(16.0)], **options)
    assert trainer.precision_plugin.scaler.get_scale() == 2.0 ** (6 // accumulate)
    assert other.precision_plugin.scaler.get_scale() == 16.0
    assert largest_difference(grown.network, constant.network) < 1e-3
    scaler = half_precision(1.0, **growing).scaler
    network, optimizer = scaled_by_hand(scaler, make_mtadam, loader, accumulate)
    assert_same(grown.network, network)
    assert_same_state(trainer.optimizers[0], optimizer)
