"""A run that goes on from a checkpoint ends as one that nothing interrupted."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.lightning_models import (
    QUIET,
    Regression,
    StepwiseRegression,
    assert_same,
    assert_same_balance_weights,
    assert_same_state,
    fit,
    make_loader,
    make_mtadam,
    make_trainer,
    needs_exact_resume,
    three_losses,
)

pytestmark = QUIET


def resume(tmp_path, steps, **options):
    """An uninterrupted run of 12 steps that saves on its way, and one that goes on from the checkpoint."""
    options = {"max_steps": 12, "max_epochs": -1, "enable_checkpointing": True, **options}
    of_module = {key: options.pop(key) for key in ("make_schedule", "dtype") if key in options}
    first_checkpoint, second_checkpoint = (
        ModelCheckpoint(tmp_path / run, filename="{step}", every_n_train_steps=steps, save_top_k=-1)
        for run in ("first", "second")
    )
    whole, resumed = StepwiseRegression(**of_module), StepwiseRegression(**of_module)
    first = fit(whole, make_loader(), callbacks=[first_checkpoint], **options)
    second = make_trainer(callbacks=[second_checkpoint], **options)
    second.fit(resumed, make_loader(), ckpt_path=tmp_path / "first" / f"step={steps}.ckpt")
    assert first.global_step == second.global_step == 12
    return whole, first.optimizers[0], resumed, second.optimizers[0]


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("steps", [4, 6], ids=["within an epoch", "at an epoch's end"])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resume_continues_bitwise(tmp_path, steps, scheduled, dtype):
    def schedule(optimizer):
        return {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=12), "interval": "step"}

    whole, first, resumed, second = resume(tmp_path, steps, make_schedule=schedule if scheduled else None, dtype=dtype)
    assert_same(whole.network, resumed.network)
    assert_same_state(first, second)
    assert_same_balance_weights(first, second)


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@needs_exact_resume
def test_resume_with_accumulation_continues_bitwise(tmp_path):
    whole, first, resumed, second = resume(tmp_path, 4, accumulate_grad_batches=2)
    assert_same(whole.network, resumed.network)
    assert_same_state(first, second)


def test_checkpoints_load_with_weights_only(tmp_path):
    trainer = fit(Regression(), make_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = loaded["optimizer_states"]
    assert tuple(state["param_groups"][0]["terms"]) == ("fit", "size", "decay")


@pytest.mark.parametrize("given", [("fit", "length"), None])
def test_resuming_with_other_terms_raises_naming_them(tmp_path, given):
    class Renamed(Regression):
        def training_step(self, batch, batch_idx):
            losses = three_losses(self.network, batch)
            return {"fit": losses["fit"], "length": losses["size"]}

    fit(Regression(), make_loader()).save_checkpoint(tmp_path / "last.ckpt")
    module = Renamed(lambda network: make_mtadam(network, terms=given))
    with pytest.raises(ValueError, match=r"(?s)(length.*size|size.*length)|\('fit', 'size', 'decay'\)") as error:
        make_trainer(max_epochs=4).fit(module, make_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert "length" in str(error.value)
    assert "size" in str(error.value)
