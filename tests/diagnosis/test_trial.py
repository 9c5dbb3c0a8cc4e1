"""Advice on modules whose kind is known: what is off by a factor, in conflict, satisfied at once, or right."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mtadam import MTAdam, MultiTermLightningModule, diagnose, report_losses
from lightning_mtadam.callbacks import BalanceWeightMonitor
from tests.lightning_models import QUIET, Regression, adam, make_loader

pytestmark = QUIET

STEPS = 50


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(512, 8, generator=generator)), batch_size=32)


class TwoHeads(MultiTermLightningModule):
    """Two regressions on one trunk.

    Args:
        make_losses: takes the trunk's output, what the heads give, and what they should; gives the losses.
        optimizer: its class.
    """

    def __init__(self, make_losses: Callable[..., dict[str, Tensor]], optimizer=torch.optim.Adam) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
            self.heads = nn.Linear(32, 2)
        self.make_losses, self.optimizer = make_losses, optimizer

    def training_step(self, batch, batch_idx):
        (x,) = batch
        hidden = self.trunk(x)
        given, due = self.heads(hidden), torch.stack([x.sum(1).sin(), x[:, :4].sum(1).cos()], 1)
        return self.make_losses(hidden, given, due)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-2)


def fits(hidden, given, due, factor=1.0):
    first, second = (given - due).square().mean(0).unbind()
    return {"first": first, "second": factor * second}


def opposed(hidden, given, due):
    return {"up": (given[:, 0] - due[:, 0]).square().mean(), "down": (given[:, 0] + due[:, 0]).square().mean()}


def satisfied(hidden, given, due):
    return {"first": fits(hidden, given, due)["first"], "easy": given[:, 1].square().mean()}


class Growing(TwoHeads):
    """The second loss grows tenfold in ten steps."""

    def training_step(self, batch, batch_idx):
        losses = super().training_step(batch, batch_idx)
        return {**losses, "second": 10 ** (self.global_step / 10) * losses["second"]}


def diagnosis_of(module, data=None, steps=STEPS, **trainer):
    return diagnose(module, loader() if data is None else data, steps=steps, accelerator="cpu", **trainer)


def test_nothing_wrong_is_left():
    found = diagnosis_of(TwoHeads(fits))
    assert (found.recommendation, found.weights) == ("leave", {"first": 1, "second": 1})


@pytest.mark.parametrize("factor", [1e4, 1e-4])
def test_a_loss_off_by_a_factor_is_given_its_inverse(factor):
    found = diagnosis_of(TwoHeads(lambda *given: fits(*given, factor=factor)))
    assert found.recommendation == "reweight"
    assert found.weights["first"] == 1
    assert 1 / 3 < found.weights["second"] * factor < 3


def test_losses_that_want_opposite_things_are_found_in_conflict():
    found = diagnosis_of(TwoHeads(opposed))
    assert found.recommendation == "conflict-aware"
    assert list(found.advice.conflicts) == [("up", "down")]


def test_a_loss_that_is_satisfied_at_once_is_not_amplified():
    found = diagnosis_of(TwoHeads(satisfied), steps=200)
    assert found.recommendation == "leave"
    assert found.advice.satisfied == ("easy",)


def test_a_balance_that_moves_is_to_be_kept_while_training():
    assert diagnosis_of(Growing(fits), steps=40).recommendation == "balance"


def test_a_private_part_does_not_count_where_terms_are_compared():
    """The first term's gradient is large in a part that the second never reaches."""

    class Private(TwoHeads):
        def training_step(self, batch, batch_idx):
            losses = super().training_step(batch, batch_idx)
            return {**losses, "first": losses["first"] + 1e4 * (self.bias - 1).square().sum()}

        def __init__(self):
            super().__init__(fits)
            self.bias = nn.Parameter(torch.zeros(3))

    assert diagnosis_of(Private()).recommendation == "leave"


def test_the_module_and_the_random_numbers_stay_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = TwoHeads(fits)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    found = diagnosis_of(module, DataLoader(loader().dataset, batch_size=32, shuffle=True))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert not list(Path(tmp_path).iterdir()), "nothing is written"
    assert capsys.readouterr().out.endswith(found.to_markdown())


def test_the_same_trial_says_the_same():
    one, other = (diagnosis_of(TwoHeads(fits), steps=20) for _ in range(2))
    assert one.to_dict()["norms"] == other.to_dict()["norms"]


def test_what_trains_with_mtadam_is_compared_by_its_raw_gradients():
    found = diagnosis_of(TwoHeads(lambda *given: fits(*given, factor=1e4), optimizer=MTAdam))
    assert found.recommendation in ("reweight", "balance")
    assert not found.costs, "its step has all backward passes already"


def test_costs_of_adam_are_estimated():
    every_step, seldom = diagnosis_of(TwoHeads(fits)).costs.values()
    assert 1 < seldom < every_step


def test_the_modules_own_callbacks_do_not_act():
    class Watched(TwoHeads):
        def configure_callbacks(self):
            return [BalanceWeightMonitor()]  # would raise: there is no logger

    assert diagnosis_of(Watched(fits), steps=10).recommendation == "leave"


def test_data_come_from_a_data_module_from_the_module_or_from_any_list():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

    class Own(TwoHeads):
        def train_dataloader(self):
            return loader()

    batches = list(loader())
    norms = [
        found.to_dict()["norms"]
        for found in (
            diagnosis_of(TwoHeads(fits), Data(), steps=10),
            diagnose(Own(fits), steps=10, accelerator="cpu"),
            diagnosis_of(TwoHeads(fits), batches, steps=10),
        )
    ]
    assert norms[0] == norms[1] == norms[2]


def test_an_ordinary_module_names_its_losses():
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 2)

        def training_step(self, batch, batch_idx):
            up, down = self.net(batch[0]).square().mean(0).unbind()
            return report_losses(self, {"up": up, "down": 1e3 * down})

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    assert diagnosis_of(Plain()).weights["down"] == pytest.approx(1e-3, rel=0.5)


def test_accumulated_and_missing_terms():
    class Seldom(TwoHeads):
        def training_step(self, batch, batch_idx):
            losses = super().training_step(batch, batch_idx)
            return losses if batch_idx % 3 else {"first": losses["first"], "other": losses["second"]}

    found = diagnosis_of(Seldom(fits), accumulate_grad_batches=2, steps=20)
    assert found.to_dict()["terms"] == ["first", "other", "second"]
    assert not found.costs


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.", "ignore:GradientReport has nothing")
def test_bad_input_names_the_remedy():
    with pytest.raises(TypeError, match="needs a LightningModule, but got"):
        diagnose(nn.Linear(2, 2), loader())
    with pytest.raises(ValueError, match="steps must be at least 4"):
        diagnosis_of(TwoHeads(fits), steps=3)
    with pytest.raises(MisconfigurationException, match="compares losses, but the training step has given one alone"):
        diagnosis_of(TwoHeads(lambda hidden, given, due: {"only": given.mean()}))
    manual = TwoHeads(fits)
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match=r"GradientReport to its own trainer"):
        diagnosis_of(manual)
    with pytest.raises(ValueError, match="with 0 reports"):
        diagnosis_of(TwoHeads(lambda *_: None))
    fixed = TwoHeads(fits)
    ready = torch.optim.Adam(fixed.parameters())
    fixed.optimizer = lambda *_, **__: ready
    with pytest.raises(ValueError, match="parameters that are not the copy's"):
        diagnosis_of(fixed)


def test_other_toy_modules_of_the_suite_can_be_diagnosed():
    found = diagnose(Regression(adam), make_loader(), steps=20, accelerator="cpu")
    assert found.recommendation == "balance" or found.weights["size"] < 0.1
