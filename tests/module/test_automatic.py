"""Automatic optimization does what the hand-written loop does, and callbacks see the sum and every term."""

import pytest
import torch

from lightning_mtadam import MTAdam
from tests.lightning_models import (
    LR,
    QUIET,
    Regression,
    assert_same,
    assert_same_state,
    fit,
    largest_difference,
    make_loader,
    make_mtadam,
    make_network,
    make_trainer,
    three_losses,
)
from tests.loops import by_hand, hand_loop
from tests.module.recorder import Recorder

pytestmark = QUIET


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


def test_gradients_seen_by_callbacks_are_the_balanced_ones_before_clipping():
    recorder, seen = Recorder(), []
    fit(Regression(), make_loader(), callbacks=[recorder], gradient_clip_val=1e-6)
    network = make_network()
    optimizer = make_mtadam(network)
    for batch in list(make_loader()) * 2:
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch))
        seen.append(tuple(parameter.grad.clone() for parameter in network.parameters()))
        optimizer.clip_gradients(1e-6)
        optimizer.step()
    assert len(recorder.gradients) == 12
    for gradients, expected in zip(recorder.gradients, seen, strict=True):
        torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


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
