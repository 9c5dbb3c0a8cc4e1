"""What is saved when."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lightning_mtadam import NonFiniteError
from tests.finetuning import Finetuned, Finetuning, finetuning_optimizer, two_losses
from tests.lightning_models import (
    Regression,
    StepwiseRegression,
    adam,
    assert_same,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    make_trainer,
)
from tests.loops import hand_loop, take_step
from tests.trainer_matrix.table import HAND_LOOP, REFUSED, row

GROUP = "Checkpoints"
MODEL_CHECKPOINT = "`ModelCheckpoint`: best k by `train/loss`, last, every n steps"


def saved(path: Path) -> nn.Module:
    """The network in a checkpoint."""
    module = Regression()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module.network


def after(batches: int, data=None):
    """The network that the hand-written loop has after so many batches, and the sum of the last losses."""
    network, data = make_network(), list(make_loader()) if data is None else data
    seen = hand_loop(network, make_mtadam(network), [*data, *data, *data, *data][:batches], epochs=1)
    return network, sum(seen[-1].values())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.ckpt")}


@row(GROUP, MODEL_CHECKPOINT, HAND_LOOP, cases=["min", "max"])
def the_best_epochs_are_kept(folder: Path, mode: str) -> None:
    checkpoint = ModelCheckpoint(folder, "{epoch}", "train/loss", save_top_k=2, mode=mode, save_on_train_epoch_end=True)
    fit(Regression(), make_loader(), max_epochs=4, enable_checkpointing=True, callbacks=[checkpoint])
    losses = {epoch: after(6 * epoch + 6)[1] for epoch in range(4)}
    best = sorted(losses, key=losses.__getitem__, reverse=mode == "max")[:2]
    assert names(folder) == {f"epoch={epoch}.ckpt" for epoch in best}
    assert float(checkpoint.best_model_score) == pytest.approx(losses[best[0]], rel=1e-6)
    for epoch in best:
        assert_same(saved(folder / f"epoch={epoch}.ckpt"), after(6 * epoch + 6)[0])


@row(GROUP, MODEL_CHECKPOINT, HAND_LOOP)
def the_last_is_kept(folder: Path) -> None:
    checkpoint = ModelCheckpoint(folder, save_top_k=0, save_last=True)
    fit(Regression(), make_loader(), enable_checkpointing=True, callbacks=[checkpoint])
    assert names(folder) == {"last.ckpt"}
    assert_same(saved(folder / "last.ckpt"), after(12)[0])


@row(GROUP, MODEL_CHECKPOINT, HAND_LOOP)
def every_fourth_step_is_kept(folder: Path) -> None:
    checkpoint = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    fit(Regression(), make_loader(), enable_checkpointing=True, callbacks=[checkpoint])
    assert names(folder) == {"step=4.ckpt", "step=8.ckpt", "step=12.ckpt"}
    for step in (4, 8, 12):
        assert_same(saved(folder / f"step={step}.ckpt"), after(step)[0])


class Diverging(StepwiseRegression):
    """One loss is not finite at the ninth step, if it is so told."""

    diverges = True

    def training_step(self, batch, batch_idx):
        losses = super().training_step(batch, batch_idx)
        return (
            {**losses, "size": losses["size"] * float("nan")}
            if self.diverges and self.trainer.global_step == 8
            else losses
        )


@row(
    GROUP,
    "`OnExceptionCheckpoint`, resumed",
    HAND_LOOP,
    ignored=["`?.fit.ckpt_path", ".*resuming from a checkpoint that ended before the epoch ended"],
)
def what_an_exception_saves_can_be_resumed(folder: Path) -> None:
    callbacks = [OnExceptionCheckpoint(folder, "interrupted")]
    with pytest.raises(NonFiniteError, match=r"losses\['size'\] is nan"):
        fit(Diverging(), make_loader(), callbacks=callbacks, enable_checkpointing=True)
    batches = StepwiseRegression.batches
    assert_same(saved(folder / "interrupted.ckpt"), after(8, batches)[0])
    module, trainer = Diverging(), make_trainer()
    module.diverges = False
    trainer.fit(module, make_loader(), ckpt_path=folder / "interrupted.ckpt")
    assert trainer.global_step == 12
    assert_same(module.network, after(12, batches)[0])


@row(
    GROUP,
    "fine-tuning by `BaseFinetuning`, resumed",
    HAND_LOOP,
    ignored=[
        "`?.fit.ckpt_path",
        ".*resuming from a checkpoint that ended before the epoch ended",
        "Be aware that when using `ckpt_path`",
    ],
)
def what_was_unfrozen_goes_on(folder: Path) -> None:
    options = {"max_steps": 18, "max_epochs": -1}
    checkpoint = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=9)
    fit(Finetuned(), make_loader(), callbacks=[checkpoint, Finetuning()], enable_checkpointing=True, **options)
    resumed, trainer = Finetuned(), make_trainer(callbacks=[Finetuning()], **options)
    trainer.fit(resumed, make_loader(), ckpt_path=folder / "step=9.ckpt")
    network, batches = make_network().requires_grad_(False), StepwiseRegression.batches
    network[2].requires_grad_(True)
    optimizer = finetuning_optimizer(network)
    for step in range(18):
        if step == 6:
            network.requires_grad_(True)
            optimizer.add_param_group({"params": list(network[0].parameters()), "lr": 1e-3})
        take_step(optimizer, two_losses(network, batches[step % len(batches)]))
    assert_same(resumed.network, network)


@row("Refused", "a checkpoint of another optimizer", REFUSED, cases=[(adam, make_mtadam), (make_mtadam, adam)])
def another_optimizers_state_is_refused(folder: Path, first, second) -> None:
    fit(Regression(first), make_loader()).save_checkpoint(folder / "last.ckpt")
    with pytest.raises(ValueError, match=r"written (by|with) MTAdam.*load_from_checkpoint\(path\)"):
        make_trainer(max_epochs=3).fit(Regression(second), make_loader(), ckpt_path=folder / "last.ckpt")
