"""Validation, test and prediction, between and after the steps."""

from pathlib import Path

import torch

from tests.lightning_models import Regression, adam, assert_same, make_loader, make_mtadam, make_trainer
from tests.loops import by_hand, hand_loop
from tests.trainer_matrix.table import HAND_LOOP, row

GROUP = "Data, evaluation"


class Evaluated(Regression):
    """Notes for every batch of an evaluation whether it runs under inference mode."""

    def __init__(self, make_optimizer=make_mtadam) -> None:
        super().__init__(make_optimizer)
        self.modes: list[tuple[str, bool]] = []

    def validation_step(self, batch, batch_idx):
        self.modes.append(("validation", torch.is_inference_mode_enabled()))
        return self.training_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.modes.append(("test", torch.is_inference_mode_enabled()))

    def predict_step(self, batch, batch_idx):
        self.modes.append(("predict", torch.is_inference_mode_enabled()))
        return self.network(batch[0])


@row(GROUP, "`inference_mode` on and off", HAND_LOOP, cases=[True, False])
def evaluating_within_and_between_runs_does_not_disturb_training(folder: Path, inference_mode: bool) -> None:
    module, held_out = Evaluated(), make_loader(3, seed=5)
    trainer = make_trainer(inference_mode=inference_mode, val_check_interval=2, num_sanity_val_steps=1)
    trainer.fit(module, make_loader(), held_out)
    network, _ = by_hand()
    assert len(module.modes) == 1 + 2 * 3 * 3
    assert_same(module.network, network)
    assert module._pending is None

    trainer.validate(module, held_out, verbose=False)
    assert module.modes[-3:] == [("validation", inference_mode)] * 3
    make_trainer().fit(module, make_loader(), held_out)
    hand_loop(network, make_mtadam(network), make_loader())
    assert_same(module.network, network)


class SlopeValidated(Regression):
    """Differentiates while it is validated."""

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            x = batch[0].requires_grad_()
            (slope,) = torch.autograd.grad(self.network(x).sum(), x)
        assert slope.any()


@row(GROUP, "gradients in `validation_step`", HAND_LOOP)
def a_validation_step_may_differentiate_without_inference_mode(folder: Path) -> None:
    module = SlopeValidated()
    make_trainer(inference_mode=False, val_check_interval=2).fit(module, make_loader(), make_loader(3, seed=5))
    assert_same(module.network, by_hand()[0])


@row(GROUP, "`val_check_interval`, `limit_*_batches`", HAND_LOOP)
def evaluations_run_as_often_as_with_adam(folder: Path) -> None:
    def evaluate(make_optimizer):
        module = Evaluated(make_optimizer)
        limits = {"limit_val_batches": 2, "limit_test_batches": 0.5, "limit_predict_batches": 1}
        trainer = make_trainer(**limits, val_check_interval=3)
        trainer.fit(module, make_loader(), make_loader(4))
        trainer.test(module, make_loader(4), verbose=False)
        trainer.predict(module, make_loader(4))
        return module

    ours, theirs = evaluate(make_mtadam), evaluate(adam)
    assert ours.modes == theirs.modes
    assert [stage for stage, _ in ours.modes].count("test") == 2
    assert_same(ours.network, by_hand()[0])
