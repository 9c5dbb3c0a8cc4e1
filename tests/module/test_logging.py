"""The terms and their sum are logged, beside what the user logs."""

import pytest

from tests.lightning_models import (
    QUIET,
    Regression,
    adam,
    assert_same,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
    total,
)
from tests.loops import by_hand, hand_loop

pytestmark = QUIET


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_terms_and_their_sum_are_logged_unnormalised(make_optimizer, accumulate):
    trainer = fit(Regression(make_optimizer), make_loader(), accumulate_grad_batches=accumulate, log_every_n_steps=1)
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
