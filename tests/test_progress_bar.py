"""The progress bars show the losses by short names, and their sum where that is what is trained on."""

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning_utilities.core.imports import RequirementCache

from lightning_mtadam.balancers import FixedWeights
from lightning_mtadam.progress_bar import LONGEST, SHOWN, bar_names
from tests.lightning_models import GAN, QUIET, Regression, adam, fit, make_loader, make_mtadam

TOTAL = "train/loss"
needs_rich = pytest.mark.skipif(not RequirementCache("rich"), reason="rich is not installed")
BARS = [TQDMProgressBar, pytest.param(RichProgressBar, marks=needs_rich)]


def tags(*terms):
    return (*(f"train/{term}" for term in terms), TOTAL)


def test_names_are_short_and_different():
    names = bar_names(
        tags("reconstruction_loss", "loss_kl", "a_very_long_name_of_one", "a_very_long_name_of_two"), TOTAL, summed=True
    )
    assert list(names.values()) == [
        "loss",
        "reconstructi",
        "kl",
        "a_very_long_name_of_one",
        "a_very_long_name_of_two",
    ]
    assert len("reconstructi") == LONGEST


def test_there_are_only_so_many():
    names = bar_names(tags(*(f"class_{index}" for index in range(10))), TOTAL, summed=False)
    assert list(names.values()) == [f"class_{index}" for index in range(SHOWN)]


def test_a_sum_of_one_term_is_not_shown_twice():
    assert bar_names(tags("fit"), TOTAL, summed=True) == {"train/fit": "fit"}


def test_a_term_is_not_called_as_the_sum_is():
    names = bar_names(tags("loss_loss", "fit"), TOTAL, summed=True)
    assert len(set(names.values())) == 3


class Weighted(Regression):
    def configure_balancer(self):
        return FixedWeights({"fit": 1.0, "size": 0.01, "decay": 3.0})


@QUIET
@pytest.mark.parametrize("bar", BARS)
@pytest.mark.parametrize(
    ("make_module", "summed"),
    [(lambda: Regression(adam), True), (lambda: Regression(make_mtadam), False), (lambda: Weighted(adam), False)],
)
def test_a_bar_shows_the_terms_and_their_sum_only_where_it_is_trained_on(bar, make_module, summed, monkeypatch):
    seen, module = [], make_module()
    get = bar.get_metrics
    monkeypatch.setattr(bar, "get_metrics", lambda self, *them: (seen.append(get(self, *them)), seen[-1])[1])
    trainer = fit(module, make_loader(3), max_epochs=1, enable_progress_bar=True, callbacks=[bar()])
    shown = {name: value for name, value in seen[-1].items() if name != "v_num"}
    assert set(shown) == {"fit", "size", "decay", *(["loss"] if summed else [])}
    for name, value in shown.items():
        assert value == pytest.approx(float(trainer.callback_metrics[f"train/{name}"]))
    assert "train/loss" in trainer.callback_metrics, "callbacks may monitor it"


@QUIET
def test_the_terms_of_all_optimizers_are_shown():
    module = GAN()
    fit(module, make_loader(2), max_epochs=1)
    assert set(module.trainer.progress_bar_metrics) == {"l1", "gan", "real", "fake"}


@QUIET
@pytest.mark.parametrize("tag", ["train/fit", "fit"])
def test_what_the_user_shows_stands_in_the_place_of_a_term(tag):
    class Showing(Regression):
        def training_step(self, batch, batch_idx):
            self.log(tag, 7.0, prog_bar=True)
            return super().training_step(batch, batch_idx)

    module = Showing(adam)
    fit(module, make_loader(2), max_epochs=1)
    shown = module.trainer.progress_bar_metrics
    assert shown[tag] == 7
    assert set(shown) == {tag, "size", "decay", "loss"}
