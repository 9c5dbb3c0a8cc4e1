"""MultiTermLightningModule under the Trainer does what the hand-written loop does."""

import copy
import math
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_mtadam import MTAdam, MultiTermLightningModule, NonFiniteError
from tests.lightning_models import (
    GAN,
    LR,
    Regression,
    StepwiseRegression,
    SumRegression,
    adam,
    assert_same,
    assert_same_state,
    by_hand,
    fit,
    gan_by_hand,
    generator_losses,
    half_precision,
    hand_loop,
    largest_difference,
    make_gan_parts,
    make_loader,
    make_mtadam,
    make_network,
    make_trainer,
    needs_exact_resume,
    three_losses,
    total,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
]


def sgd(network):
    return torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)


class Recorder(pl.Callback):
    """Keeps copies of what the hooks see."""

    def __init__(self):
        self.outputs, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(tuple(p.grad.clone() for p in pl_module.network.parameters()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs.append(outputs)


class SumDifferentiator(pl.Callback):
    """Differentiates the sum of the terms before every batch."""

    def __init__(self):
        self.gradients = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        parameters = list(pl_module.network.parameters())
        loss = total(three_losses(pl_module.network, batch))
        self.gradients.append(torch.autograd.grad(loss, parameters))


# Automatic optimization equals the hand-written loop


def test_automatic_optimization_equals_the_hand_written_loop():
    module = Regression()
    trainer = fit(module, make_loader())
    network, optimizer = by_hand()
    assert_same(module.network, network)
    assert_same_state(trainer.optimizers[0], optimizer)
    assert largest_difference(module.network, make_network()) > 0.01
    assert module._pending is None


def test_configure_gradient_clipping_of_the_user_reaches_mtadam():
    class Clipping(Regression):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=1e-4, gradient_clip_algorithm="value")

    module = Clipping()
    fit(module, make_loader())
    assert_same(module.network, by_hand(clip=(1e-4, "value"))[0])


def test_training_step_may_call_super():
    class Extended(Regression):
        def training_step(self, batch, batch_idx):
            losses = super().training_step(batch, batch_idx)
            return {**losses, "mean": self.network(batch[0]).mean().square()}

    def losses(network, batch):
        return {**three_losses(network, batch), "mean": network(batch[0]).mean().square()}

    module = Extended()
    fit(module, make_loader())
    assert_same(module.network, by_hand(losses=losses)[0])


def test_validation_step_may_call_training_step():
    class Validated(Regression):
        validated = 0

        def validation_step(self, batch, batch_idx):
            losses = self.training_step(batch, batch_idx)
            assert not torch.is_grad_enabled()
            assert set(losses) == {"fit", "size", "decay"}
            self.log("val/fit", losses["fit"])
            self.validated += 1
            return losses

    module = Validated()
    trainer = make_trainer(num_sanity_val_steps=2, val_check_interval=2, log_every_n_steps=1)
    trainer.fit(module, make_loader(), make_loader(3, seed=5))
    assert module.validated == 2 + 2 * 3 * 3
    assert_same(module.network, by_hand()[0])
    assert module._pending is None
    assert trainer.callback_metrics["val/fit"] > 0


def test_a_second_fit_with_another_trainer_starts_a_new_optimizer():
    module = Regression()
    fit(module, make_loader())
    fit(module, make_loader())
    network, _ = by_hand()
    hand_loop(network, make_mtadam(network), make_loader())
    assert_same(module.network, network)


def test_layers_carry_the_names_of_the_module_if_the_optimizer_got_bare_parameters():
    trainer = fit(Regression(lambda network: MTAdam(network.parameters(), lr=LR)), make_loader())
    expected = [f"network.{name}" for name, _ in make_network().named_parameters()]
    assert list(trainer.optimizers[0].balance_weights()) == expected


def test_a_module_within_the_module_does_not_take_its_losses():
    class Outer(Regression):
        def __init__(self):
            super().__init__()
            self.inner = Regression()

    module = Outer()
    fit(module, make_loader())
    assert_same(module.network, by_hand()[0])
    assert_same(module.inner.network, make_network())


def test_a_term_may_be_absent_in_some_steps():
    terms = ("fit", "size", "decay")

    def make_optimizer(network):
        return make_mtadam(network, terms=terms)

    def losses(network, batch):
        found = three_losses(network, batch)
        return found if batch[0][0, 0] > 0 else {"fit": found["fit"], "decay": found["decay"]}

    class Sometimes(Regression):
        def training_step(self, batch, batch_idx):
            return losses(self.network, batch)

    assert {bool(batch[0][0, 0] > 0) for batch in make_loader()} == {True, False}
    module = Sometimes(make_optimizer)
    fit(module, make_loader())
    assert_same(module.network, by_hand(make_optimizer, losses=losses)[0])


# Callbacks


def test_gradients_seen_by_callbacks_are_the_sum_over_the_terms():
    recorder, of_the_sum = Recorder(), SumDifferentiator()
    fit(Regression(), make_loader(), callbacks=[recorder, of_the_sum], gradient_clip_val=1e-6)
    assert len(recorder.gradients) == 12
    for gradients, expected in zip(recorder.gradients, of_the_sum.gradients, strict=True):
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


def test_outputs_seen_by_callbacks_are_detached_terms_and_the_loss():
    recorder = Recorder()
    fit(Regression(), make_loader(), callbacks=[recorder])
    network = make_network()
    seen = hand_loop(network, make_mtadam(network), make_loader())
    assert len(recorder.outputs) == len(seen)
    for outputs, losses in zip(recorder.outputs, seen, strict=True):
        assert set(outputs) == {"fit", "size", "decay", "loss"}
        assert not any(value.requires_grad for value in outputs.values())
        assert {name: outputs[name].item() for name in losses} == losses
        assert outputs["loss"].item() == pytest.approx(sum(losses.values()), rel=1e-12)


# Other optimizers and other outputs


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("clip", [None, (0.1, "norm"), (0.1, "value")])
@pytest.mark.parametrize("make_optimizer", [adam, sgd])
def test_another_optimizer_trains_on_the_plain_sum(make_optimizer, clip, accumulate):
    module = Regression(make_optimizer)
    limit, algorithm = clip or (None, None)
    fit(
        module,
        make_loader(),
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
        accumulate_grad_batches=accumulate,
    )
    assert_same(module.network, by_hand(make_optimizer, clip=clip, accumulate=accumulate)[0])
    assert module._pending is None


def test_another_optimizer_differentiates_once_per_step():
    class Counting(Regression):
        backwards = 0

        def on_after_backward(self):
            self.backwards += 1

    calls = []
    module = Counting(adam)
    module.network[0].weight.register_hook(lambda gradient: calls.append(None))
    fit(module, make_loader())
    assert module.backwards == len(calls) == 12


class OrdinaryOutput(Regression):
    """Returns what an ordinary LightningModule may return."""

    extras = False

    def training_step(self, batch, batch_idx):
        loss = total(three_losses(self.network, batch))
        return {"loss": loss, "extra": loss.detach() * 2, "note": "kept"} if self.extras else loss


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_tensor_or_a_dict_with_loss_trains_as_in_every_lightning_module(extras, accumulate):
    module, plain, recorder = OrdinaryOutput(adam), SumRegression(adam), Recorder()
    module.extras = extras
    fit(module, make_loader(), accumulate_grad_batches=accumulate, callbacks=[recorder])
    fit(plain, make_loader(), accumulate_grad_batches=accumulate)
    assert_same(module.network, plain.network)
    assert set(recorder.outputs[0]) == ({"loss", "extra", "note"} if extras else {"loss"})


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_mtadam_on_a_single_loss_equals_adam(extras, accumulate):
    module, plain, recorder = OrdinaryOutput(), SumRegression(adam), Recorder()
    module.extras = extras
    trainer = fit(module, make_loader(), accumulate_grad_batches=accumulate, callbacks=[recorder])
    fit(plain, make_loader(), accumulate_grad_batches=accumulate)
    assert largest_difference(module.network, plain.network) < 1e-12
    assert trainer.optimizers[0].terms == ("loss",)
    assert set(recorder.outputs[0]) == ({"loss", "extra", "note"} if extras else {"loss"})


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize(
    ("make_optimizer", "set_to_none"),
    # Not (adam, False): where p.grad is zero, Adam takes a step with its old moments.
    [(make_mtadam, True), (make_mtadam, False), (adam, True)],
)
def test_a_training_step_that_returns_none_skips_the_step(make_optimizer, set_to_none):
    class Skipping(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=set_to_none)

    module = Skipping(make_optimizer)
    fit(module, make_loader())
    batches = [batch for index, batch in enumerate(make_loader()) if index not in (0, 3)]
    assert_same(module.network, by_hand(make_optimizer, batches=batches)[0])


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_skipped_batch_drops_out_of_its_accumulated_group():
    class Skipping(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module = Skipping()
    fit(module, make_loader(), accumulate_grad_batches=2)
    network = make_network()
    optimizer = make_mtadam(network)
    for batch in [*list(make_loader())[::2]] * 2:
        optimizer.zero_grad()
        optimizer.backward({name: loss / 2 for name, loss in three_losses(network, batch).items()})
        optimizer.step()
    assert_same(module.network, network)


# Logging


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_terms_and_their_sum_are_logged_unnormalised(make_optimizer, accumulate):
    recorder = Recorder()
    trainer = fit(
        Regression(make_optimizer),
        make_loader(),
        callbacks=[recorder],
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
    )
    network = make_network()
    seen = hand_loop(network, make_optimizer(network), make_loader(), accumulate=accumulate)
    expected = {f"train/{name}": value for name, value in seen[-1].items()}
    expected["train/loss"] = sum(seen[-1].values())
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == pytest.approx(expected, rel=1e-6)
    assert set(trainer.logged_metrics) == set(expected)
    assert set(trainer.progress_bar_metrics) == {"train/loss"}
    assert trainer.progress_bar_metrics["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-6)


def test_nothing_is_logged_without_log_terms():
    module = Regression()
    module.log_terms = False
    trainer = fit(module, make_loader())
    assert not trainer.callback_metrics
    assert not trainer.progress_bar_metrics
    assert_same(module.network, by_hand()[0])


class Logging(Regression):
    """Logs by itself what the module logs too, with other arguments, and something of its own before and after."""

    def training_step(self, batch, batch_idx):
        losses = super().training_step(batch, batch_idx)
        self.log("mine/before", losses["fit"], on_step=True, on_epoch=True)
        self.log_tags(losses)
        if self.automatic_optimization:
            return losses
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.backward_terms(losses, optimizer)
        optimizer.step()
        self.log("mine/after", losses["fit"], on_step=True, on_epoch=True)
        return None

    def log_tags(self, losses):
        pass


@pytest.mark.parametrize("automatic", [True, False])
def test_the_user_may_log_the_same_tags(automatic):
    class SameTags(Logging):
        def log_tags(self, losses):
            self.log("train/loss", total(losses), on_step=True, on_epoch=True)
            self.log("train/fit", losses["fit"], prog_bar=True)

    module = SameTags()
    module.automatic_optimization = automatic
    trainer = fit(module, make_loader())
    network = make_network()
    seen = hand_loop(network, make_mtadam(network), make_loader())
    mean = sum(sum(losses.values()) for losses in seen[6:]) / 6
    assert_same(module.network, network)
    assert float(trainer.callback_metrics["train/fit"]) == pytest.approx(seen[-1]["fit"], rel=1e-6)
    assert float(trainer.callback_metrics["train/loss_epoch"]) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("automatic", [True, False])
def test_the_averages_that_the_user_logs_are_not_disturbed(automatic):
    module = Logging()
    module.automatic_optimization = automatic
    trainer = fit(module, make_loader())
    network = make_network()
    seen = hand_loop(network, make_mtadam(network), make_loader())
    mean = sum(losses["fit"] for losses in seen[6:]) / 6
    for tag in ["mine/before"] if automatic else ["mine/before", "mine/after"]:
        assert float(trainer.callback_metrics[f"{tag}_epoch"]) == pytest.approx(mean, rel=1e-6)
        assert float(trainer.callback_metrics[f"{tag}_step"]) == pytest.approx(seen[-1]["fit"], rel=1e-6)
    assert float(trainer.callback_metrics["train/fit"]) == pytest.approx(seen[-1]["fit"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_a_training_step_on_the_loaders_iterator_logs_its_terms():
    class Iterating(Regression):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return three_losses(self.network, batch)

    module = Iterating()
    trainer = fit(module, make_loader())
    assert_same(module.network, by_hand()[0])
    assert "train/fit" in trainer.callback_metrics


# Manual optimization


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_a_gan_in_manual_optimization_equals_the_hand_written_loop(make_optimizer, toggle):
    module = GAN(make_optimizer, toggle=toggle)
    trainer = fit(module, make_loader())
    generator, discriminator = gan_by_hand(make_optimizer)
    assert trainer.global_step == 24
    assert_same(module.generator, generator)
    assert_same(module.discriminator, discriminator)
    assert module._pending is None
    assert set(trainer.callback_metrics) == {"train/l1", "train/gan", "train/real", "train/fake"}


@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_gradients_reach_only_the_optimizers_own_parameters(make_optimizer):
    class Watching(GAN):
        def training_step(self, batch, batch_idx):
            generator, _ = self.optimizers()
            self.backward_terms(generator_losses(self.generator, self.discriminator, batch), generator)
            assert all(p.grad is not None for p in self.generator.parameters())
            assert all(p.grad is None for p in self.discriminator.parameters())
            generator.step()
            self.looked = True

    module = Watching(make_optimizer)
    fit(module, make_loader(1), max_epochs=1)
    assert module.looked
    assert_same(module.discriminator, make_gan_parts()[1])
    assert largest_difference(module.generator, make_gan_parts()[0]) > 0


@pytest.mark.parametrize("make_optimizer", [lambda network: make_mtadam(network, eps=1e-2), sgd])
@pytest.mark.parametrize(("limit", "algorithm"), [(1e-3, "norm"), (1e-4, "value")])
def test_clipping_in_manual_optimization_acts(make_optimizer, limit, algorithm):
    class Clipping(GAN):
        def after_backward(self, optimizer):
            self.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)

    module = Clipping(make_optimizer)
    fit(module, make_loader())
    generator, discriminator = gan_by_hand(make_optimizer, clip=(limit, algorithm))
    assert_same(module.generator, generator)
    assert_same(module.discriminator, discriminator)
    assert largest_difference(generator, gan_by_hand(make_optimizer)[0]) > 1e-3


def test_gradients_add_up_over_several_backward_terms_in_manual_optimization():
    class Accumulating(Regression):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            if batch_idx % 2 == 0:
                optimizer.zero_grad()
            self.backward_terms({n: loss / 2 for n, loss in three_losses(self.network, batch).items()}, optimizer)
            if batch_idx % 2:
                optimizer.step()

    module = Accumulating()
    module.automatic_optimization = False
    fit(module, make_loader())
    assert_same(module.network, by_hand(accumulate=2)[0])


def test_step_after_manual_backward_says_to_use_backward_terms():
    class Wrong(Regression):
        def training_step(self, batch, batch_idx):
            self.manual_backward(total(three_losses(self.network, batch)))
            self.optimizers().step()

    module = Wrong()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="backward_terms"):
        fit(module, make_loader())
    assert_same(module.network, make_network())


# Resuming


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
    weights, others = first.balance_weights(), second.balance_weights()
    assert weights.keys() == others.keys()
    for layer, values in weights.items():
        torch.testing.assert_close(values, others[layer], rtol=0, atol=0, equal_nan=True)


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


# Errors


def infinite(losses):
    return {**losses, "size": losses["size"] * math.inf}


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda losses: {}, ValueError, "losses is empty"),
        (lambda losses: {**losses, "fit": losses["fit"].expand(3)}, ValueError, r"losses\['fit'\].*shape \(3,\)"),
        (lambda losses: {**losses, "fit": losses["fit"].item()}, TypeError, r"losses\['fit'\].*float.*\.item\(\)"),
        (lambda losses: {**losses, "fit": losses["fit"].detach()}, ValueError, r"losses\['fit'\] has no graph"),
        (lambda losses: {**losses, 3: losses["fit"]}, TypeError, "non-empty string, but got 3"),
    ],
)
@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_wrong_losses_raise_and_change_nothing(make_optimizer, spoil, error, message):
    class Wrong(Regression):
        def training_step(self, batch, batch_idx):
            return spoil(super().training_step(batch, batch_idx))

    module = Wrong(make_optimizer)
    with pytest.raises(error, match=message):
        fit(module, make_loader())
    assert_same(module.network, make_network())


def test_an_unknown_term_raises_with_a_hint():
    module = Regression(lambda network: make_mtadam(network, terms=("fit", "sizes", "decay")))
    with pytest.raises(ValueError, match=r"'size'.*\('fit', 'sizes', 'decay'\).*Did you mean 'sizes'"):
        fit(module, make_loader())
    assert_same(module.network, make_network())


@pytest.mark.parametrize("kind", [NonFiniteError, FloatingPointError, ValueError])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_non_finite_loss_raises_naming_the_term_and_changes_nothing(kind, value):
    class Diverging(Regression):
        def training_step(self, batch, batch_idx):
            losses = super().training_step(batch, batch_idx)
            if batch_idx == 3:
                losses["size"] = losses["size"] * value
            return losses

    module = Diverging()
    with pytest.raises(kind, match=r"losses\['size'\] is (inf|nan).*Nothing was changed"):
        fit(module, make_loader())
    assert_same(module.network, by_hand(batches=list(make_loader())[:3], epochs=1)[0])


def test_a_non_finite_gradient_of_a_finite_loss_raises_naming_the_term_and_the_layer():
    class Rooted(Regression):
        def training_step(self, batch, batch_idx):
            losses = super().training_step(batch, batch_idx)
            return {**losses, "root": (self.network[2].bias - self.network[2].bias.detach()).sum().sqrt()}

    module = Rooted()
    with pytest.raises(NonFiniteError, match=r"term 'root' at the layer '2.bias' is not finite"):
        fit(module, make_loader())
    assert_same(module.network, make_network())


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda network, batch: {}, ValueError, "losses is empty"),
        (lambda network, batch: {"fit": network(batch[0])}, ValueError, r"losses\['fit'\] must be a scalar"),
        (lambda network, batch: network(batch[0]).mean(), TypeError, "losses must be a mapping"),
    ],
)
def test_backward_terms_checks_its_losses(losses, error, message):
    class Wrong(Regression):
        def training_step(self, batch, batch_idx):
            self.backward_terms(losses(self.network, batch), self.optimizers())

    module = Wrong()
    module.automatic_optimization = False
    with pytest.raises(error, match=message):
        fit(module, make_loader())
    assert module._pending is None


# Mixed precision


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
