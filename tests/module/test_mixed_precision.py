"""Under a gradient scaler, overflows skip their own step alone."""

import copy
import math
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch

from tests.lightning_models import (
    QUIET,
    Regression,
    fit,
    half_precision,
    largest_difference,
    make_loader,
    make_network,
    three_losses,
)

pytestmark = QUIET


class Snapshots(pl.Callback):
    """Parameters and optimizer state after every batch."""

    def __init__(self):
        self.taken = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        optimizer = trainer.optimizers[0]
        self.taken.append(copy.deepcopy((pl_module.state_dict(), optimizer.state_dict()["state"])))


def same(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("factor", [1e38, math.inf, math.nan])
@pytest.mark.parametrize("term", ["fit", "size"])
def test_a_scaler_skips_exactly_the_step_with_a_non_finite_gradient(term, factor, accumulate):
    class Overflowing(Regression):
        def training_step(self, batch, batch_idx):
            losses = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                losses[term] = losses[term].float() * factor
            return losses

    module, loader, snapshots = Overflowing(dtype=torch.float32), make_loader(dtype=torch.float32), Snapshots()
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    trainer = fit(module, loader, plugins=[half_precision(16.0)], callbacks=[snapshots], **options)
    unchanged = [same(a, b) for a, b in pairwise(snapshots.taken)]
    assert unchanged == ([False, True, False, False, False] if accumulate == 1 else [False, True, True, True, False])
    clocks = {state["step"][0].item() for state in trainer.optimizers[0].state_dict()["state"].values()}
    assert clocks == {5.0 if accumulate == 1 else 2.0}
    assert trainer.precision_plugin.scaler.get_scale() == 8.0


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_training_step_that_returns_none_skips_the_step_under_a_scaler():
    class Skipping(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)

    module, loader, snapshots = Skipping(dtype=torch.float32), make_loader(dtype=torch.float32), Snapshots()
    fit(module, loader, max_epochs=1, plugins=[half_precision(16.0)], callbacks=[snapshots])
    assert same(snapshots.taken[0][0], Regression(dtype=torch.float32).state_dict())
    assert [same(a, b) for a, b in pairwise(snapshots.taken)] == [False, False, True, False, False]


def test_a_scale_that_overflows_at_the_first_step_is_halved_until_training_starts():
    snapshots = Snapshots()
    module = Regression(dtype=torch.float32)
    loader = make_loader(20, dtype=torch.float32)
    trainer = fit(module, loader, max_epochs=1, plugins=[half_precision(2.0**14)], callbacks=[snapshots])
    parameters, state = snapshots.taken[0]
    assert same(parameters, Regression(dtype=torch.float32).state_dict())
    assert not any(tensor.any() for entry in state.values() for tensor in entry.values())
    assert trainer.precision_plugin.scaler.get_scale() < 2.0**14
    assert largest_difference(module.network, make_network(torch.float32)) > 0.01


def test_manual_optimization_under_a_scaler_stays_near_single_precision():
    class Manual(Regression):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.backward_terms(three_losses(self.network, batch), optimizer)
            optimizer.step()

    half, single = (Manual(dtype=torch.float32) for _ in range(2))
    half.automatic_optimization = single.automatic_optimization = False
    loader = make_loader(dtype=torch.float32)
    trainer = fit(half, loader, plugins=[half_precision(16.0)])
    fit(single, loader)
    assert 0 < largest_difference(half.network, single.network) < 2e-3
    assert trainer.optimizers[0].gradient_norms()["2.weight"][1] > 1
