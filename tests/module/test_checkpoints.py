"""A run that goes on from a checkpoint ends as one that nothing interrupted."""

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint

from lightning_mtadam.balancers import FixedWeights, GradNorm, UncertaintyWeighting
from tests.balancers.cases import CASES, Balanced
from tests.finetuning import Finetuned, Finetuning
from tests.lightning_models import (
    QUIET,
    Regression,
    StepwiseRegression,
    SumRegression,
    adam,
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


MID_EPOCH = pytest.mark.filterwarnings(
    "ignore:.*resuming from a checkpoint that ended before the epoch ended", "ignore:The dirpath has changed"
)


# Fine-tuning: callbacks that freeze, and later add groups


def finetune(folder, steps, callback, options, named=True, ckpt_path=None):
    module = Finetuned(named=named, **options)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=steps, save_top_k=-1)
    trainer = make_trainer(max_steps=18, max_epochs=-1, enable_checkpointing=True, callbacks=[saving, callback])
    trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
    return module, trainer.optimizers[0]


FINETUNED = {
    "default": {},
    "terms given": {"terms": ("fit", "size")},
    "light steps": {"balance_every": 3},
    "low memory": {"low_memory": True},
    "by group": {"layers": "group"},
}


@MID_EPOCH
@needs_exact_resume
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("options", FINETUNED.values(), ids=FINETUNED)
@pytest.mark.parametrize("steps", [5, 9, 12], ids=["before it unfreezes", "after", "an epoch after"])
def test_fine_tuning_resumes_bitwise(tmp_path, steps, options, named):
    whole, first = finetune(tmp_path / "first", steps, Finetuning(), options, named)
    path = tmp_path / "first" / f"step={steps}.ckpt"
    resumed, second = finetune(tmp_path / "second", steps, Finetuning(), options, named, path)
    assert len(second.param_groups) == 2
    assert_same(whole.network, resumed.network)
    assert_same_state(first, second)
    assert_same_balance_weights(first, second)


@MID_EPOCH
@needs_exact_resume
def test_backbone_finetuning_resumes_as_with_adam(tmp_path):
    """Which leaves the backbone frozen that it had unfrozen; the head goes on."""
    path = tmp_path / "first" / "step=9.ckpt"
    make = lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)  # noqa: E731
    finetune(tmp_path / "first", 9, make(), {})
    saved = torch.load(path, weights_only=True)["state_dict"]
    resumed, optimizer = finetune(tmp_path / "second", 9, make(), {}, ckpt_path=path)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert not resumed.backbone.weight.requires_grad
    assert torch.equal(resumed.backbone.weight, saved["network.0.weight"])
    assert not torch.equal(resumed.network[2].weight, saved["network.2.weight"])


# Between MTAdam and other optimizers


@pytest.mark.parametrize("saved_by", [make_mtadam, adam])
def test_a_checkpoint_of_another_optimizer_is_refused_with_the_remedy(tmp_path, saved_by):
    path = tmp_path / "last.ckpt"
    fit(Regression(saved_by), make_loader()).save_checkpoint(path)
    other = Regression(adam if saved_by is make_mtadam else make_mtadam)
    message = {
        make_mtadam: r"written with MTAdam, but .* returns Adam.*Regression.load_from_checkpoint\(path\)",
        adam: r"not written by MTAdam.*load_from_checkpoint\(path\), and no ckpt_path",
    }[saved_by]
    with pytest.raises(ValueError, match=message):
        make_trainer(max_epochs=3).fit(other, make_loader(), ckpt_path=path)
    remedy = Regression.load_from_checkpoint(path, make_optimizer=other.make_optimizer)
    fit(remedy, make_loader())


def test_a_plain_module_is_left_to_torch(tmp_path):
    path = tmp_path / "last.ckpt"
    fit(SumRegression(adam), make_loader()).save_checkpoint(path)
    make_trainer(max_epochs=3).fit(SumRegression(adam), make_loader(), ckpt_path=path)


# Balancers


@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_of_every_balancer_loads_with_weights_only(tmp_path, case):
    trainer = fit(Balanced(CASES[case]), make_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_mtadam_balancer"]
    saved = trainer.lightning_module.balancer.state_dict()
    assert loaded["terms"] == saved["terms"] != ()
    assert loaded["state"].keys() == saved["state"].keys()
    assert all(torch.equal(value, saved["state"][key]) for key, value in loaded["state"].items())


@pytest.mark.parametrize("options", [{"balance_every": 3}, {"low_memory": True}, {"amsgrad": True}], ids=str)
def test_checkpoints_of_other_modes_load_with_weights_only(tmp_path, options):
    trainer = fit(Regression(lambda network: make_mtadam(network, **options)), make_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (state,) = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"]
    assert state["param_groups"][0]["steps"] == 12


class Weighted(Regression):
    """With GradNorm, of which the state is not the module's."""

    def __init__(self):
        super().__init__(adam)

    def configure_balancer(self):
        return GradNorm(shared="network.0", alpha=0.5)


class OwnHook(Weighted):
    """With a hook that does not call super."""

    seen = ()

    def on_load_checkpoint(self, checkpoint):
        self.seen = (*self.seen, checkpoint["epoch"])


class CallsSuper(Weighted):
    def on_load_checkpoint(self, checkpoint):
        super().on_load_checkpoint(checkpoint)


class Mixin:
    def on_load_checkpoint(self, checkpoint):
        self.seen = True


class Mixed(Mixin, Weighted):
    pass


class Derived(OwnHook):
    pass


@pytest.mark.parametrize("kind", [Weighted, OwnHook, CallsSuper, Mixed, Derived])
def test_load_from_checkpoint_brings_the_balancers_state(tmp_path, kind):
    module = kind()
    fit(module, make_loader()).save_checkpoint(tmp_path / "last.ckpt")
    saved = module.balancer.state_dict()
    loaded = kind.load_from_checkpoint(tmp_path / "last.ckpt")
    found = loaded.balancer.state_dict()
    assert (found["balancer"], found["terms"]) == ("GradNorm", ("fit", "size", "decay"))
    assert found["state"]
    assert all(torch.equal(value, saved["state"][key]) for key, value in found["state"].items())
    if isinstance(module, OwnHook):
        assert loaded.seen == (2,), "the user's hook is called once"
    fit(loaded, make_loader(), max_epochs=1)
    assert not all(torch.equal(value, saved["state"][key]) for key, value in loaded.balancer.state.items())


class Unweighted(Weighted):
    def configure_balancer(self):
        return None


class Fixed(Weighted):
    def configure_balancer(self):
        return FixedWeights({"fit": 1.0, "size": 1.0, "decay": 1.0})


ANEW = {
    "no state": (Unweighted, Weighted, "made without a balancer: GradNorm begins anew"),
    "another's": (Fixed, Weighted, "GradNorm begins anew: The checkpoint holds the state of the balancer FixedWeights"),
    "no balancer": (Weighted, Unweighted, "made with the balancer GradNorm, but the module has none"),
}


@pytest.mark.parametrize("case", ANEW)
def test_load_from_checkpoint_says_if_a_balancer_begins_anew(tmp_path, case):
    first, second, message = ANEW[case]
    fit(first(), make_loader()).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=message):
        loaded = second.load_from_checkpoint(tmp_path / "last.ckpt")
    if loaded.balancer is not None:
        assert loaded.balancer.terms == ()
    fit(loaded, make_loader(), max_epochs=1)


class Uncertain(StepwiseRegression):
    """Its log variances are learned in float64, as the rest."""

    given: tuple = ()

    def configure_balancer(self):
        return UncertaintyWeighting(self.given or None)

    def configure_optimizers(self):
        return (torch.optim.Adam if self.given else torch.optim.SGD)(self.parameters(), lr=1e-2)


class Known(Uncertain):
    given = ("fit", "size", "decay")


@MID_EPOCH
@needs_exact_resume
@pytest.mark.parametrize("kind", [Uncertain, Known])
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_uncertainty_weighting_resumes_bitwise_in_float64(tmp_path, kind, precision):
    def run(folder, ckpt_path=None):
        saving = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        options = {"max_steps": 12, "max_epochs": -1, "enable_checkpointing": True, "precision": precision}
        module, trainer = kind(), make_trainer(callbacks=[saving], **options)
        trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
        return module

    whole, resumed = run("first"), run("second", tmp_path / "first" / "step=4.ckpt")
    learned = whole.balancer.learned.log_variances
    assert learned.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert torch.equal(learned, resumed.balancer.learned.log_variances)
    assert_same(whole.network, resumed.network)
