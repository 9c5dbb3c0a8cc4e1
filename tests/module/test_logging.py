"""The terms and their sum are logged, and their means over an epoch; what the user logs stands in their place."""

import pytest
import torch
from torchmetrics import MeanMetric

from tests.combinations import every
from tests.lightning_models import (
    GAN,
    QUIET,
    MemoryLogger,
    Regression,
    adam,
    assert_same,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    make_trainer,
    three_losses,
    total,
)
from tests.loops import by_hand, hand_loop

pytestmark = QUIET

BATCHES = 6


def logged_by_hand(make_optimizer=make_mtadam, accumulate=1):
    """What is to be logged in each batch of two epochs."""
    network = make_network()
    seen = hand_loop(network, make_optimizer(network), make_loader(BATCHES), accumulate=accumulate)
    return [{f"train/{name}": one for name, one in {**losses, "loss": sum(losses.values())}.items()} for losses in seen]


def means(batches):
    """The means over the batches, under their tags."""
    names = dict.fromkeys(name for batch in batches for name in batch)
    found = {name: [batch[name] for batch in batches if name in batch] for name in names}
    return {f"{name}_epoch": sum(values) / len(values) for name, values in found.items()}


def floats(metrics):
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_terms_and_their_sum_are_logged_unnormalised_and_their_means_over_an_epoch(make_optimizer, accumulate):
    trainer = fit(Regression(make_optimizer), make_loader(), accumulate_grad_batches=accumulate, log_every_n_steps=1)
    seen = logged_by_hand(make_optimizer, accumulate)
    expected = {**seen[-1], **means(seen[BATCHES:])}
    assert floats(trainer.callback_metrics) == pytest.approx(expected, rel=1e-6)
    assert floats(trainer.logged_metrics) == pytest.approx(expected, rel=1e-6)
    shown = ["fit", "size", "decay", *(["loss"] if make_optimizer is adam else [])]
    assert trainer.progress_bar_metrics == pytest.approx({name: expected[f"train/{name}"] for name in shown}, rel=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_loggers_get_the_terms_where_the_trainer_logs_and_their_means_when_an_epoch_ends(every):
    logger = MemoryLogger()
    fit(Regression(), make_loader(), logger=logger, log_every_n_steps=every)
    seen = logged_by_hand()
    expected = [(step, seen[step]) for step in range(every - 1, 2 * BATCHES, every)]
    expected += [(end - 1, means(seen[end - BATCHES : end])) for end in (BATCHES, 2 * BATCHES)]
    key = lambda row: (row[0], len(next(iter(row[1]))))  # noqa: E731
    rows = [(step, {tag: value for tag, value in row.items() if tag != "epoch"}) for step, row in logger.rows]
    assert len(rows) == len(expected)
    for (step, row), (other, values) in zip(sorted(rows, key=key), sorted(expected, key=key), strict=True):
        assert step == other
        assert row == pytest.approx(values, rel=1e-6)


def test_of_a_run_of_one_epoch_callbacks_read_all_means_and_loggers_that_of_the_sum():
    logger = MemoryLogger()
    trainer = fit(Regression(), make_loader(), logger=logger, log_every_n_steps=1, max_epochs=1)
    expected = means(logged_by_hand()[:BATCHES])
    found = floats(trainer.callback_metrics)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    ends = [{tag: value for tag, value in row.items() if tag.endswith("_epoch")} for _, row in logger.rows]
    sums = {"train/loss_epoch": expected["train/loss_epoch"]}
    assert [row for row in ends if row] == [pytest.approx(sums, rel=1e-6)]


class Reading(Regression):
    """Reads, in a hook, what a callback would."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        found = self.trainer.callback_metrics
        self.read = [*getattr(self, "read", []), {name: float(found[name]) for name in ("train/fit", "train/loss")}]


def test_callbacks_read_the_numbers_of_the_batch_that_ends():
    module = Reading()
    fit(module, make_loader(), max_epochs=1)
    expected = [{name: batch[name] for name in ("train/fit", "train/loss")} for batch in logged_by_hand()[:BATCHES]]
    assert [pytest.approx(batch, rel=1e-6) for batch in module.read] == expected


def test_the_mean_of_a_term_is_over_the_batches_that_have_it():
    class Sometimes(Regression):
        def training_step(self, batch, batch_idx):
            losses = three_losses(self.network, batch)
            return losses if batch_idx % 3 == 0 else {"fit": losses["fit"], "decay": losses["decay"]}

    def losses(network, batch):
        index = next(i for i, one in enumerate(make_loader()) if torch.equal(one[0], batch[0]))
        found = three_losses(network, batch)
        return found if index % 3 == 0 else {"fit": found["fit"], "decay": found["decay"]}

    trainer = fit(Sometimes(), make_loader())
    network = make_network()
    seen = hand_loop(network, make_mtadam(network), make_loader(), losses=losses)[BATCHES:]
    expected = means([{f"train/{name}": value for name, value in batch.items()} for batch in seen])
    found = floats(trainer.callback_metrics)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_terms_of_several_optimizers_are_logged_without_a_sum():
    module, logger = GAN(), MemoryLogger()
    fit(module, make_loader(), logger=logger, log_every_n_steps=2)
    tags = {"train/l1", "train/gan", "train/real", "train/fake"}
    assert all(set(row) - {"epoch"} in (tags, {f"{tag}_epoch" for tag in tags}) for _, row in logger.rows)
    assert floats(module.trainer.callback_metrics).keys() == tags | {f"{tag}_epoch" for tag in tags}


def test_nothing_is_logged_without_log_terms():
    module = Regression()
    module.log_terms = False
    trainer = fit(module, make_loader())
    assert not trainer.callback_metrics
    assert not trainer.progress_bar_metrics
    assert_same(module.network, by_hand()[0])


@pytest.mark.parametrize("automatic", [True, False])
def test_a_bare_trainer_logs_nothing_and_trains(automatic):
    module = Logging()
    module.automatic_optimization, module.log_terms = automatic, True
    module.log = lambda *arguments, **options: None  # which Lightning would warn of
    trainer = fit(module, make_loader(), barebones=True, logger=None, enable_checkpointing=None)
    assert not trainer.callback_metrics
    assert_same(module.network, by_hand()[0])


def test_a_fast_dev_run_logs_its_batch():
    trainer = fit(Regression(), make_loader(), fast_dev_run=True)
    (first, *_) = logged_by_hand()
    expected = {**first, **means([first])}
    assert floats(trainer.callback_metrics) == pytest.approx(expected, rel=1e-6)


# What the user logs


class Logging(Regression):
    """Logs by itself what the module logs too, and something of its own before and after."""

    def training_step(self, batch, batch_idx):
        losses = super().training_step(batch, batch_idx)
        self.log("mine/before", losses["fit"], on_step=True, on_epoch=True)
        self.log_in("training_step")
        if self.automatic_optimization:
            return losses
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.backward_terms(losses, optimizer)
        self.log_in("after backward_terms")
        optimizer.step()
        self.log("mine/after", losses["fit"], on_step=True, on_epoch=True)
        return None

    def log_in(self, hook):
        """For tests that log."""


def add_hook(name):
    def hook(self, *arguments):
        self.log_in(name)

    return hook


HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
HOOKS = (*HOOKS, "on_train_batch_end")
IN_BATCHES = ("training_step", *HOOKS)
OPTIONS = [
    {},
    {"on_epoch": True},
    {"on_step": False, "on_epoch": True},
    {"prog_bar": True},
    {"logger": False, "on_epoch": True},
    {"sync_dist": True, "reduce_fx": "max", "on_epoch": True},
]


class SameTags(Logging):
    """Logs numbers of its own under two of the module's tags, in one of the hooks."""

    def __init__(self, hook, options, metric):
        super().__init__()
        self.hook, self.options, self.count = hook, options, 0
        self.metric = MeanMetric() if metric else None

    def log_in(self, hook):
        if hook == self.hook:
            self.count += 1
            for tag in ("train/loss", "train/fit"):
                value = self.count if self.metric is None else self.metric
                if self.metric is not None:
                    self.metric(float(self.count))
                self.log(tag, value, **self.options)


for name in (*HOOKS, "on_train_epoch_end"):
    setattr(SameTags, name, add_hook(name))


def everything_logged(automatic, log_terms, hook, options, metric):
    """All that a run shows under tags of the user's, everywhere."""
    module, logger = SameTags(hook, options, metric), MemoryLogger()
    module.automatic_optimization, module.log_terms = automatic, log_terms
    trainer = fit(module, make_loader(), logger=logger, log_every_n_steps=2)
    assert_same(module.network, by_hand()[0])
    rows = [{"step": step, **row} for step, row in logger.rows]
    shown = [trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics, *rows]

    def users(metrics):
        return {tag: float(value) for tag, value in metrics.items() if tag == "step" or "loss" in tag or "fit" in tag}

    found = [users(metrics) for metrics in shown]
    return [metrics for metrics in found if set(metrics) - {"step"}], trainer


PLACES = [(True, hook) for hook in IN_BATCHES] + [(False, hook) for hook in (*IN_BATCHES, "after backward_terms")]


@pytest.mark.parametrize(("place", "options", "metric"), every(2, PLACES, OPTIONS, (False, True)), ids=str)
@pytest.mark.filterwarnings("ignore:You called `self.log.* floating")
def test_what_the_user_logs_is_as_if_the_module_logged_nothing(place, options, metric):
    automatic, hook = place
    found, trainer = everything_logged(automatic, True, hook, options, metric)
    alone, _ = everything_logged(automatic, False, hook, options, metric)
    assert found == alone
    assert "train/size_epoch" in trainer.callback_metrics, "the other terms are logged"


@pytest.mark.parametrize("automatic", [True, False])
def test_what_the_user_logs_when_an_epoch_ends_stands_from_then_on(automatic):
    class Ends(SameTags):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            self.read = [*getattr(self, "read", []), float(self.trainer.callback_metrics["train/loss"])]

    module, logger = Ends("on_train_epoch_end", {}, False), MemoryLogger()
    module.automatic_optimization = automatic
    trainer = fit(module, make_loader(), logger=logger, log_every_n_steps=1, max_epochs=3)
    assert module.read == [1, 2, 3]
    assert "train/loss_epoch" not in trainer.callback_metrics
    later = [(step, row["train/loss"]) for step, row in logger.rows if step >= BATCHES and "train/loss" in row]
    assert later == [(2 * BATCHES - 1, 2), (3 * BATCHES - 1, 3)]


def test_an_own_mean_over_an_epoch_stands_beside_the_modules_numbers():
    class Mean(Regression):
        def on_train_epoch_end(self):
            self.log("train/loss_epoch", 7.0)

    logger = MemoryLogger()
    trainer = fit(Mean(), make_loader(), logger=logger, log_every_n_steps=1)
    assert float(trainer.callback_metrics["train/loss_epoch"]) == 7
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(logged_by_hand()[-1]["train/loss"], rel=1e-6)
    assert [row["train/loss_epoch"] for _, row in logger.rows if "train/loss_epoch" in row] == [7, 7]


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


def test_a_tag_of_the_modules_that_is_logged_in_validation_is_the_users():
    class Validated(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("train/loss", total(three_losses(self.network, batch)) * 0 + 5)

    logger, module = MemoryLogger(), Validated()
    trainer = make_trainer(logger=logger, log_every_n_steps=1, num_sanity_val_steps=1)
    trainer.fit(module, make_loader(), make_loader(2))
    assert {row["train/loss"] for _, row in logger.rows if "train/loss" in row} == {5}
