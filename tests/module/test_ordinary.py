"""Without a trainer, around the module and after it, Lightning is as without it."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_mtadam import MultiTermLightningModule
from tests.lightning_models import (
    QUIET,
    Regression,
    SumRegression,
    adam,
    largest_difference,
    make_loader,
    make_mtadam,
    make_network,
    make_trainer,
)

pytestmark = QUIET


def test_the_module_is_an_ordinary_lightning_module_without_a_trainer():
    module = Regression()
    assert isinstance(module, MultiTermLightningModule)
    assert isinstance(module.network, nn.Module)
    assert set(module.training_step(next(iter(make_loader())), 0)) == {"fit", "size", "decay"}
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = module.trainer


class PlainDict(pl.LightningModule):
    """An ordinary module that forgot the key "loss", around one of ours."""

    def __init__(self):
        super().__init__()
        self.inner = Regression(make_mtadam)

    def training_step(self, batch, batch_idx):
        return self.inner.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_a_module_around_ours_is_an_ordinary_one(tmp_path):
    outer = PlainDict()
    with pytest.raises(MisconfigurationException, match="'loss' key needs to be present"):
        make_trainer(default_root_dir=tmp_path).fit(outer, make_loader())
    copy.deepcopy(outer)


def test_a_trainer_that_has_trained_ours_is_an_ordinary_one(tmp_path):
    trainer = make_trainer(default_root_dir=tmp_path)
    trainer.fit(Regression(make_mtadam), make_loader())
    trainer.fit_loop.max_epochs += 1
    with pytest.raises(MisconfigurationException, match="'loss' key needs to be present"):
        trainer.fit(PlainDict(), make_loader())


def test_a_trainer_reads_the_losses_of_its_own_module_also_if_another_trains_ours_since(tmp_path):
    ours = Regression(make_mtadam)
    first, second = make_trainer(default_root_dir=tmp_path), make_trainer(default_root_dir=tmp_path)
    first.fit(ours, make_loader())
    second.fit(ours, make_loader())
    first.fit_loop.max_epochs += 1
    plain = SumRegression(adam)
    first.fit(plain, make_loader())
    assert largest_difference(plain.network, make_network()) > 0


def test_a_module_can_be_copied_after_a_step_that_was_cut_short(tmp_path):
    class CutShort(Regression):
        def on_before_zero_grad(self, optimizer):
            raise KeyError("cut short")

    module = CutShort(make_mtadam)
    with pytest.raises(KeyError, match="cut short"):
        make_trainer(default_root_dir=tmp_path).fit(module, make_loader())
    copy.deepcopy(module)
