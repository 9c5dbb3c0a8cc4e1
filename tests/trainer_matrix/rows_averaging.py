"""Averages of the weights."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn, update_bn

from tests.lightning_models import (
    Regression,
    assert_same,
    fit,
    largest_difference,
    make_loader,
    make_mtadam,
    make_network,
    make_trainer,
)
from tests.loops import hand_loop
from tests.trainer_matrix.table import HAND_LOOP, row

GROUP = "Learning rate, averages"


@row(
    GROUP,
    "`StochasticWeightAveraging`",
    HAND_LOOP,
    cases=["without BatchNorm", "with BatchNorm"],
    ignored=["Swapping scheduler"],
)
def stochastic_weight_averaging_averages_and_leaves_nothing_pending(folder: Path, batch_norm: str) -> None:
    has_batch_norm = batch_norm == "with BatchNorm"
    averaging = StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=1)
    module = Regression(batch_norm=has_batch_norm)
    fit(module, make_loader(), max_epochs=5, callbacks=[averaging])

    network = make_network(batch_norm=has_batch_norm)
    optimizer, averaged = make_mtadam(network), AveragedModel(network)
    hand_loop(network, optimizer, make_loader(), epochs=1)
    scheduler = SWALR(optimizer, swa_lr=5e-3, anneal_epochs=1)
    for _ in range(3):
        averaged.update_parameters(network)
        hand_loop(network, optimizer, make_loader(), epochs=1, scheduler=scheduler, interval="epoch")
    averaged.update_parameters(network)
    update_bn([x for x, _ in make_loader()], averaged)
    for ours, theirs in zip(module.network.state_dict().values(), averaged.module.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert largest_difference(module.network, network) > 1e-4
    assert module._pending is None


class ValidatedWeights(Regression):
    """Keeps the weights that it was last validated with."""

    validated: torch.Tensor

    def validation_step(self, batch, batch_idx):
        self.validated = self.network[0].weight.detach().clone()


def weight_averaging(average: str):
    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("this Lightning has no WeightAveraging")
    return callbacks.WeightAveraging(**averages(average))


def averages(average: str):
    return {"avg_fn": get_ema_avg_fn(0.9)} if average == "EMA" else {}


@row(GROUP, "`WeightAveraging` (mean and EMA)", HAND_LOOP, cases=[("mean", 1), ("EMA", 1), ("EMA", 2)])
def weight_averaging_averages_the_weights_of_every_step(folder: Path, average: str, accumulate: int) -> None:
    module, trainer = (
        ValidatedWeights(),
        make_trainer(callbacks=[weight_averaging(average)], accumulate_grad_batches=accumulate),
    )
    trainer.fit(module, make_loader(), make_loader(1))
    network = make_network()
    optimizer, averaged = make_mtadam(network), AveragedModel(network, **averages(average))
    batches = list(make_loader()) * 2
    for start in range(0, len(batches), accumulate):
        hand_loop(network, optimizer, batches[start : start + accumulate], epochs=1, accumulate=accumulate)
        averaged.update_parameters(network)
    assert_same(module.network, averaged.module)
    assert torch.equal(module.validated, averaged.module[0].weight)
    assert largest_difference(module.network, network) > 1e-3


@row(GROUP, "`WeightAveraging` (mean and EMA)", HAND_LOOP, ignored=["Checkpoint directory .* exists"])
def weight_averaging_goes_on_after_a_resume(folder: Path) -> None:
    def run(**options):
        module = Regression()
        checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(enable_checkpointing=True, callbacks=[weight_averaging("EMA"), checkpoint])
        trainer.fit(module, make_loader(), **options)
        return module.network

    assert_same(run(), run(ckpt_path=folder / "epoch=0.ckpt"))
