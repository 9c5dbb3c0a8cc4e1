"""GradientReport: what it says of losses whose gradients are known, when, where, and what it refuses."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

import lightning_mtadam
from lightning_mtadam import MTAdam, MultiTermLightningModule
from lightning_mtadam.callbacks import GradientReport, report_losses
from lightning_mtadam.callbacks.gradient_pictures import joined
from lightning_mtadam.gradient_statistics import statistics_of
from tests.lightning_models import (
    GAN,
    QUIET,
    MemoryLogger,
    Regression,
    adam,
    fit,
    half_precision,
    make_loader,
    make_mtadam,
    make_trainer,
    needs_exact_resume,
)

pytestmark = [QUIET, pytest.mark.filterwarnings("ignore:.*exists and is not empty")]


def steps(count):
    """A loader of so many batches that say nothing."""
    return DataLoader(torch.zeros(count, 1), batch_size=1)


class Known(MultiTermLightningModule):
    """Losses that are linear in two parameters, "left" of two entries and "right" of one: their gradients are given."""

    def __init__(self, gradients, make_optimizer=adam):
        super().__init__()
        self.left, self.right = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.gradients, self.make_optimizer = gradients, make_optimizer

    def losses(self):
        entries = torch.cat([self.left.weight.flatten(), self.right.weight.flatten()])
        return {name: (torch.tensor(gradient) * entries).sum() for name, gradient in self.gradients.items()}

    def training_step(self, batch, batch_idx):
        return self.losses()

    def configure_optimizers(self):
        return self.make_optimizer(self)


def reported(gradients, make_optimizer=adam, **options):
    """The first report on losses of these gradients."""
    report = GradientReport()
    fit(Known(gradients, make_optimizer), steps(1), max_epochs=1, callbacks=[report], **options)
    return report.latest


# What it says


def test_of_adam_everything_is_that_of_the_sum():
    found = reported({"a": [3.0, 0.0, 0.0], "b": [0.0, 0.0, 4.0]})
    assert found.terms == ("a", "b")
    assert found.norms == pytest.approx({"a": 3, "b": 4})
    assert found.update_norm == pytest.approx(5)
    assert found.shares == pytest.approx({"a": 9 / 25, "b": 16 / 25})
    assert found.cosines["a"] == pytest.approx({"a": 1, "b": 0})
    assert found.cosines_to_update == pytest.approx({"a": 3 / 5, "b": 4 / 5})
    assert found.alignment == pytest.approx(0)
    assert (found.dead, found.drowned, found.conflicts) == ((), (), ())


def test_layers_have_the_same_of_their_own():
    layers = reported({"a": [3.0, 4.0, 1.0], "b": [-4.0, 3.0, -1.0]}).layers
    assert list(layers) == ["left", "right"]
    assert layers["left"].norms == pytest.approx({"a": 5, "b": 5})
    assert layers["left"].shares == pytest.approx({"a": 0.5, "b": 0.5})
    assert layers["left"].conflicts == ()
    assert layers["right"].conflicts == (("a", "b", -1.0),)
    assert not layers["right"].layers


def test_mtadams_shares_are_those_of_the_balanced_terms_and_its_norms_those_of_the_losses():
    found = reported({"a": [3.0, 0.0, 0.0], "b": [0.0, 4000.0, 0.0]}, make_mtadam)
    assert found.norms == pytest.approx({"a": 3, "b": 4000})
    assert found.shares == pytest.approx({"a": 0.5, "b": 0.5})
    assert found.cosines_to_update == pytest.approx({"a": math.sqrt(0.5), "b": math.sqrt(0.5)})
    plain = reported({"a": [3.0, 0.0, 0.0], "b": [0.0, 4000.0, 0.0]})
    assert plain.drowned == ("a",)
    assert found.drowned == ()


@pytest.mark.parametrize("make_optimizer", [adam, make_mtadam])
def test_a_loss_without_a_gradient_is_dead(make_optimizer):
    found = reported({"a": [3.0, 0.0, 1.0], "b": [0.0, 0.0, 0.0]}, make_optimizer)
    assert found.dead == ("b",)
    assert found.shares == pytest.approx({"a": 1, "b": 0})
    assert math.isnan(found.cosines["a"]["b"])
    assert "dead: b" in str(found)


@pytest.mark.parametrize("make_optimizer", [adam, make_mtadam])
def test_a_constant_zero_is_dead_too(make_optimizer):
    class Constant(Known):
        def losses(self):
            return {"zero": torch.zeros(()), **super().losses()}

    report = GradientReport()
    fit(Constant({"a": [3.0, 0.0, 1.0]}, make_optimizer), steps(1), max_epochs=1, callbacks=[report])
    assert report.latest.dead == ("zero",)
    assert report.latest.norms == pytest.approx({"zero": 0, "a": math.sqrt(10)})


@pytest.mark.parametrize("make_optimizer", [adam, make_mtadam])
def test_losses_that_pull_against_each_other_are_in_conflict(make_optimizer):
    found = reported({"a": [1.0, 0.0, 0.0], "b": [-1.0, 1.0, 0.0], "c": [0.0, 1.0, 0.0]}, make_optimizer)
    ((one, other, cosine),) = found.conflicts
    assert (one, other, cosine) == ("a", "b", pytest.approx(-math.sqrt(0.5)))
    assert "in conflict: a and b, cosine -0.71" in str(found)


def test_a_loss_that_reaches_no_parameter_of_the_optimizer_is_dead_and_no_error():
    class Outside(Known):
        def configure_optimizers(self):
            return torch.optim.Adam(self.left.parameters())

    report = GradientReport()
    module = Outside({"a": [1.0, 0.0, 0.0], "b": [0.0, 0.0, 1.0]})
    fit(module, steps(1), max_epochs=1, callbacks=[report])
    assert report.latest.dead == ("b",)
    assert list(report.latest.layers) == ["left"]


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("parameter", ["left.weight", "right.weight"]),
        ("module", ["left", "right"]),
        ("global", ["global"]),
        (lambda name: name[:4], ["left", "righ"]),
    ],
)
def test_layers_are_what_the_rule_says(layers, names):
    report = GradientReport(layers=layers)
    fit(Known({"a": [1.0, 0.0, 0.0], "b": [0.0, 0.0, 1.0]}), steps(1), max_epochs=1, callbacks=[report])
    assert list(report.latest.layers) == names


def test_frozen_layers_are_left_out():
    class Frozen(Known):
        def __init__(self):
            super().__init__({"a": [1.0, 0.0, 5.0], "b": [0.0, 1.0, 5.0]})
            self.right.requires_grad_(False)

    report = GradientReport()
    fit(Frozen(), steps(1), max_epochs=1, callbacks=[report])
    assert list(report.latest.layers) == ["left"]
    assert report.latest.norms == pytest.approx({"a": 1, "b": 1})


# When, and where to


def logged(module, every, batches, **options):
    """What a memory logger got of the report: [(step, metrics)]; and the steps of the callback's own."""
    logger, report, seen = MemoryLogger(), GradientReport(every), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_):
            seen.append(report.latest and report.latest.step)

    options = {"max_epochs": 1, **options}
    fit(module, batches, callbacks=[report, Watch()], logger=logger, log_every_n_steps=1, **options)
    rows = [(at, {tag: one for tag, one in row.items() if tag.startswith("gradient")}) for at, row in logger.rows]
    return [(at, row) for at, row in rows if row], seen


@pytest.mark.parametrize("make_optimizer", [adam, make_mtadam])
def test_a_report_comes_at_step_0_and_every_n_steps_and_is_logged_at_that_step(make_optimizer):
    rows, seen = logged(Regression(make_optimizer), 4, make_loader(10))
    assert [at for at, _ in rows] == [0, 4, 8]
    assert seen == [0] * 4 + [4] * 4 + [8] * 2


def test_accumulated_batches_are_one_step():
    rows, seen = logged(Regression(adam), 2, make_loader(9), accumulate_grad_batches=2)
    assert [at for at, _ in rows] == [0, 2, 4]
    assert seen == [None, 0, 0, 0, 0, 2, 2, 2, 4]


def test_every_logger_gets_few_tags_and_those_of_cosines_say_so():
    rows, _ = logged(Known({"a": [3.0, 0.0, 0.0], "b": [0.0, 0.0, 4.0]}), 1, steps(1))
    assert rows == [
        (
            0,
            pytest.approx(
                {
                    "gradient_norm/a": 3,
                    "gradient_norm/b": 4,
                    "gradient_share/a": 0.36,
                    "gradient_share/b": 0.64,
                    "gradient_cosine/a.b": 0,
                    "gradient_cosine/a.update": 0.6,
                    "gradient_cosine/b.update": 0.8,
                    "gradient_alignment": 0,
                    "gradient_terms/dead": 0,
                    "gradient_terms/drowned": 0,
                    "gradient_terms/conflicts": 0,
                }
            ),
        )
    ]


def test_what_is_not_a_number_is_not_logged():
    ((_, row),) = logged(Known({"a": [3.0, 0.0, 0.0], "b": [0.0, 0.0, 0.0]}), 1, steps(1))[0]
    assert not any(map(math.isnan, row.values()))
    assert "gradient_cosine/b.update" not in row
    assert row["gradient_terms/dead"] == 1


def test_of_many_terms_the_smallest_cosine_of_each_is_logged():
    gradients = {f"t{index}": [math.cos(index), math.sin(index), 1.0] for index in range(10)}
    found = reported(gradients)
    tags = found.scalars()
    cosines = {tag: value for tag, value in tags.items() if "cosine" in tag}
    assert len(cosines) == 20
    others = [value for other, value in found.cosines["t3"].items() if other != "t3"]
    assert cosines["gradient_cosine/t3.smallest"] == min(others)
    assert len(tags) == 10 + 10 + 20 + 1 + 3


def images(folder):
    found = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0}).Reload()
    return {tag: [event.step for event in found.Images(tag)] for tag in found.Tags()["images"]}


def test_tensorboard_gets_terms_by_terms_and_layers_by_terms(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    fit(Regression(adam), make_loader(4), max_epochs=1, callbacks=[GradientReport(2)], logger=logger)
    expected = ["gradient_cosine/terms_by_terms", "gradient_cosine/layers_by_terms", "gradient_share/layers_by_terms"]
    assert images(tmp_path) == {tag: [0, 2] for tag in expected}


def test_layers_are_joined_until_a_picture_has_room_and_add_up():
    names = [f"blocks.{block}.{part}" for block in range(3) for part in ("conv", "norm")] + ["head"]
    gradients = [[torch.tensor([float(index), 1.0]) for index in range(7)], [torch.ones(2)] * 7]
    found = statistics_of(gradients)
    fewer, rows = joined(found, names, 4)
    assert rows == ["blocks.0", "blocks.1", "blocks.2", "head"]
    torch.testing.assert_close(fewer.gram[1], found.gram[2] + found.gram[3])
    assert joined(found, names, 7)[1] == names
    assert joined(found, names, 1)[1] == ["blocks", "head"], "names have no less to say"


# With balance_every, low_memory


def test_with_balance_every_a_report_waits_for_a_measured_step():
    measured = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if not optimizer._pending.light:
                measured.append(trainer.global_step)

    report, logger = GradientReport(7), MemoryLogger()
    module = Regression(lambda network: make_mtadam(network, balance_every=5))
    fit(module, make_loader(40), max_epochs=1, callbacks=[report, Watch()], logger=logger)
    found = [at for at, row in logger.rows if "gradient_alignment" in row]
    expected, due = [], 0
    for step in measured:
        if step >= due:
            expected.append(step)
            due = (step // 7 + 1) * 7
    assert found == expected
    assert len(measured) < 40


# Manual optimization


def test_each_optimizer_of_a_gan_has_reports_of_its_own():
    for make_optimizer in (make_mtadam, adam):
        rows, _ = logged(GAN(make_optimizer), 3, make_loader(4))
        name = make_optimizer(nn.Linear(1, 1)).__class__.__name__
        assert len(rows) == 4, "two optimizers, steps 0 and 3"
        tags = {tag for _, row in rows for tag in row if "norm" in tag}
        assert tags == {
            f"gradient_norm-{name}/l1",
            f"gradient_norm-{name}/gan",
            f"gradient_norm-{name}-1/real",
            f"gradient_norm-{name}-1/fake",
        }


def test_reports_has_the_last_one_of_each_optimizer():
    report = GradientReport()
    fit(GAN(adam), make_loader(2), max_epochs=1, callbacks=[report])
    assert report.reports["Adam"].terms == ("l1", "gan")
    assert report.reports["Adam-1"].terms == ("real", "fake")
    assert report.latest is report.reports["Adam-1"]


def test_an_optimizer_without_named_losses_is_passed_over_beside_one_with():
    class Half(GAN):
        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.backward_terms(
                {"a": self.generator(batch[0]).mean(), "b": self.generator(batch[0]).square().mean()}, first
            )
            first.step()
            self.manual_backward(self.discriminator(batch[1]).mean())
            second.step()

    report = GradientReport()
    fit(Half(adam), make_loader(2), max_epochs=1, callbacks=[report])
    assert list(report.reports) == ["Adam"]


# An ordinary LightningModule


class Ordinary(pl.LightningModule):
    """Reports the losses of ``Known``, weighted; returns their sum."""

    def __init__(self, gradients, weights, named_raw=False):
        super().__init__()
        self.known, self.weights, self.named_raw = Known(gradients), weights, named_raw
        self.seen = []

    def training_step(self, batch, batch_idx):
        losses = self.known.losses()
        weighted = {name: self.weights[name] * loss for name, loss in losses.items()}
        total = report_losses(self, losses if self.named_raw else weighted)
        self.seen.append(total.item())
        return sum(weighted.values()) if self.named_raw else total

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


GRADIENTS, WEIGHTS = {"a": [3.0, 0.0, 0.0], "b": [0.0, 0.0, 40.0]}, {"a": 1.0, "b": 0.1}


def test_an_ordinary_module_names_its_losses_by_report_losses():
    report, module = GradientReport(), Ordinary(GRADIENTS, WEIGHTS)
    fit(module, steps(2), max_epochs=1, callbacks=[report])
    assert report.latest.norms == pytest.approx({"a": 3, "b": 4})
    assert report.latest.shares == pytest.approx({"a": 0.36, "b": 0.64})


def test_shares_are_those_of_the_losses_as_they_are_weighted_in_what_is_trained_on():
    report = GradientReport()
    fit(Ordinary(GRADIENTS, WEIGHTS, named_raw=True), steps(1), max_epochs=1, callbacks=[report])
    assert report.latest.norms == pytest.approx({"a": 3, "b": 40})
    assert report.latest.shares == pytest.approx({"a": 0.36, "b": 0.64})
    assert report.latest.update_norm == pytest.approx(5)


def test_report_losses_gives_the_sum_with_a_report_and_without_and_is_a_public_name():
    assert lightning_mtadam.report_losses is report_losses
    module = Ordinary(GRADIENTS, WEIGHTS)
    expected = sum(WEIGHTS[name] * loss for name, loss in module.known.losses().items())
    assert torch.equal(report_losses(module, {n: WEIGHTS[n] * x for n, x in module.known.losses().items()}), expected)
    fit(module, steps(1), max_epochs=1)
    assert module.seen == [expected.item()]


def test_losses_that_are_reported_in_validation_are_not_taken_for_those_of_training():
    class Validated(Ordinary):
        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    report = GradientReport(1)
    trainer = make_trainer(max_epochs=2, callbacks=[report], num_sanity_val_steps=1)
    trainer.fit(Validated(GRADIENTS, WEIGHTS), steps(2), steps(1))
    assert report.latest.step == 3


def test_of_several_optimizers_report_losses_is_told_whose_losses_these_are():
    class Two(GAN):
        told = True

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            output = self.generator(batch[0])
            losses = {"one": output.abs().mean(), "two": output.square().mean()}
            total = report_losses(self, losses, first if self.told else None)
            self.manual_backward(total)
            first.step()
            first.zero_grad()
            self.manual_backward(self.discriminator(batch[1]).mean())
            second.step()
            second.zero_grad()

    report = GradientReport()
    fit(Two(adam), make_loader(2), max_epochs=1, callbacks=[report])
    assert report.reports["Adam"].terms == ("one", "two")
    Two.told = False
    with pytest.raises(MisconfigurationException, match=r"2 optimizers\. Say whose losses these are"):
        fit(Two(adam), make_loader(2), max_epochs=1, callbacks=[GradientReport()])


def test_mtadam_in_a_loop_of_the_users_own_is_reported():
    class Own(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.known, self.automatic_optimization = Known(GRADIENTS), False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            optimizer.backward(self.known.losses())
            optimizer.step()

        def configure_optimizers(self):
            return MTAdam(self.named_parameters())

    report = GradientReport()
    fit(Own(), steps(1), max_epochs=1, callbacks=[report])
    assert report.latest.norms == pytest.approx({"a": 3, "b": 40})


# Gradient scalers, and what is not finite


@pytest.mark.parametrize(
    "make_optimizer", [make_mtadam, adam, lambda net: torch.optim.Adam(net.parameters(), fused=True)]
)
def test_a_gradient_scaler_leaves_no_trace_in_the_figures(make_optimizer):
    options = {"plugins": half_precision(2.0**10)}
    found = reported({"a": [3.0, 0.0, 0.0], "b": [0.0, 0.0, 4.0]}, make_optimizer, **options)
    assert found.norms == pytest.approx({"a": 3, "b": 4})
    plain = reported({"a": [3.0, 0.0, 0.0], "b": [0.0, 0.0, 4.0]}, make_optimizer)
    assert found.shares == pytest.approx(plain.shares)
    assert found.update_norm == pytest.approx(plain.update_norm)


@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_a_step_that_is_not_finite_is_not_reported_the_next_one_is(make_optimizer):
    class Bursting(Known):
        def training_step(self, batch, batch_idx):
            losses = self.losses()
            return {**losses, "b": losses["b"] * (torch.inf if batch_idx == 0 else 1)}

    module = Bursting(GRADIENTS, make_optimizer)
    rows, seen = logged(module, 10, steps(3), plugins=half_precision(16.0))
    assert seen == [None, 1, 1]
    assert all(map(math.isfinite, rows[0][1].values()))


# Going on


@needs_exact_resume
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("make_module", [lambda: Regression(adam), lambda: GAN(adam)])
def test_a_resumed_run_goes_on_in_its_rhythm(make_module, tmp_path):
    first = GradientReport(4)
    trainer = fit(make_module(), make_loader(6), max_epochs=1, callbacks=[first])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    report = GradientReport(4)
    other = make_trainer(max_epochs=2, callbacks=[report])
    other.fit(make_module(), make_loader(6), ckpt_path=tmp_path / "half.ckpt")
    assert first.latest.step == 4
    assert report.latest.step == 8


# What is refused


class Single(Known):
    def training_step(self, batch, batch_idx):
        return sum(self.losses().values())


@pytest.mark.parametrize(("make_optimizer", "match"), [(adam, "no losses by name"), (make_mtadam, "one alone, 'loss'")])
def test_a_loss_without_a_name_is_refused_at_the_first_step(make_optimizer, match):
    module = Single(GRADIENTS, make_optimizer)
    before = [one.clone() for one in module.parameters()]
    with pytest.raises(MisconfigurationException, match=match):
        fit(module, steps(2), max_epochs=1, callbacks=[GradientReport()])
    assert all(map(torch.equal, before, module.parameters()))


def test_one_named_loss_is_refused():
    with pytest.raises(MisconfigurationException, match=r"one alone, 'a'\. Return each of its parts by name"):
        fit(Known({"a": [1.0, 0.0, 0.0]}), steps(2), max_epochs=1, callbacks=[GradientReport()])


def test_a_manual_run_that_names_nothing_is_told_of_when_it_ends():
    class Silent(GAN):
        def training_step(self, batch, batch_idx):
            for optimizer, network in zip(self.optimizers(), (self.generator, self.discriminator), strict=True):
                optimizer.zero_grad()
                self.manual_backward(network(batch[0] if network is self.generator else batch[1]).mean())
                optimizer.step()

    with pytest.warns(UserWarning, match="nothing to report"):
        fit(Silent(adam), make_loader(2), max_epochs=1, callbacks=[GradientReport()])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"every_n_steps": 0}, ValueError, "must be at least 1, but is 0"),
        ({"every_n_steps": -3}, ValueError, "must be at least 1, but is -3"),
        ({"every_n_steps": 2.5}, TypeError, r"must be an integer, but is 2\.5"),
        ({"every_n_steps": True}, TypeError, "must be an integer, but is True"),
        ({"layers": "block"}, ValueError, r"layers must be one of .*, but is 'block'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        GradientReport(**options)


@pytest.mark.parametrize(
    ("losses", "error", "match"),
    [
        ({"a": torch.ones(2)}, ValueError, "must be a scalar"),
        ({"a": 3.0}, TypeError, "must be a scalar tensor"),
        ([], TypeError, "must be a mapping"),
    ],
)
def test_report_losses_refuses_what_is_no_loss(losses, error, match):
    class Wrong(Ordinary):
        def training_step(self, batch, batch_idx):
            return report_losses(self, losses)

    with pytest.raises(error, match=match):
        fit(Wrong(GRADIENTS, WEIGHTS), steps(1), max_epochs=1, callbacks=[GradientReport()])
