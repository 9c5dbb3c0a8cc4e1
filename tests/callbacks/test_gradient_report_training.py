"""GradientReport beside training of every kind: its figures are those of a loop by hand, and training is as without."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mtadam import MultiTermLightningModule
from lightning_mtadam.callbacks import GradientReport
from tests.balancers.cases import CASES, Balanced
from tests.lightning_models import (
    GAN,
    QUIET,
    Regression,
    adam,
    assert_same,
    assert_same_state,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    sgd,
    three_losses,
)

pytestmark = QUIET


def lbfgs(network):
    return torch.optim.LBFGS(network.parameters(), lr=0.1, max_iter=4)


def low_memory(network):
    return make_mtadam(network, low_memory=True)


OPTIMIZERS = {
    "adam": adam,
    "sgd": sgd,
    "lbfgs": lbfgs,
    "mtadam": make_mtadam,
    "mtadam, low_memory": low_memory,
    "mtadam, balance_every": lambda network: make_mtadam(network, balance_every=3),
    "mtadam, module": lambda network: make_mtadam(network, layers="module", anchor="mean"),
}


# What is reported


class Watching(pl.Callback):
    """Differentiates the losses of each batch by itself, before the backward pass, and adds up those of a step."""

    def __init__(self):
        self.steps, self.terms, self.update = [], {}, []

    def on_before_backward(self, trainer, module, loss):
        pending = module.pending
        parameters = list(module.network.parameters())
        for name, term in pending.losses.items():
            found = torch.autograd.grad(term / pending.accumulated, parameters, retain_graph=True, allow_unused=True)
            found = [torch.zeros_like(p) if one is None else one for one, p in zip(found, parameters, strict=True)]
            before = self.terms.get(name, found)
            self.terms[name] = found if before is found else [a + b for a, b in zip(before, found, strict=True)]

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.update = [one.grad.clone() for one in module.network.parameters()]

    def on_train_batch_end(self, trainer, module, *_):
        if self.update:
            self.steps.append((self.terms, self.update))
            self.terms, self.update = {}, []


def flat(tensors):
    return torch.cat([one.flatten() for one in tensors])


def assert_reported(found, terms, update, layers=(("0", 0, 2), ("2", 2, 4))):
    """Fail unless a report says of the network, and of its layers, what these gradients and this update are like."""
    rows = {name: flat(gradients) for name, gradients in terms.items()}
    update_all = flat(update)
    assert found.norms == pytest.approx({name: float(row.norm()) for name, row in rows.items()}, rel=1e-9)
    assert found.update_norm == pytest.approx(float(update_all.norm()), rel=1e-6)
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-12)
    for name, row in rows.items():
        to_update = float(row @ update_all / row.norm() / update_all.norm())
        assert found.cosines_to_update[name] == pytest.approx(to_update, abs=1e-6)
        cosines = {other: float(row @ one / row.norm() / one.norm()) for other, one in rows.items()}
        assert found.cosines[name] == pytest.approx(cosines, abs=1e-9)
    mean = torch.stack([row / row.norm() for row in rows.values()]).mean(0)
    assert found.alignment == pytest.approx(float(2 * mean.square().sum() - 1), abs=1e-9)
    for name, begin, end in layers if found.layers else ():
        mine = {term: gradients[begin:end] for term, gradients in terms.items()}
        norms = {term: float(flat(gradients).norm()) for term, gradients in mine.items()}
        assert found.layers[f"network.{name}"].norms == pytest.approx(norms, rel=1e-9)
        assert found.layers[f"network.{name}"].update_norm == pytest.approx(
            float(flat(update[begin:end]).norm()), rel=1e-6
        )


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", ["adam", "mtadam", "mtadam, module", "mtadam, balance_every"])
def test_the_figures_are_those_of_the_accumulated_gradients_and_the_update_is_p_grad(name, accumulate):
    report, watch = GradientReport(2), Watching()
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 1, "callbacks": [watch, report]}
    fit(Regression(OPTIMIZERS[name]), make_loader(9), **options)
    assert report.latest.step >= 2 or accumulate > 1
    assert_reported(report.latest, *watch.steps[report.latest.step])


def test_with_low_memory_the_figures_are_the_same():
    found = []
    for name in ("mtadam", "mtadam, low_memory"):
        report = GradientReport(3)
        fit(Regression(OPTIMIZERS[name]), make_loader(5), max_epochs=1, callbacks=[report])
        found.append(report.latest)
    assert found[1].norms == pytest.approx(found[0].norms, rel=1e-12)
    assert found[1].shares == pytest.approx(found[0].shares, rel=1e-12)
    assert found[1].cosines["fit"] == pytest.approx(found[0].cosines["fit"], rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_figures_are_those_of_every_balancers_update(name):
    report, watch, case = GradientReport(3), Watching(), CASES[name]
    fit(Balanced(case), make_loader(5), max_epochs=1, callbacks=[watch, report])
    terms, update = watch.steps[3]
    assert_reported(report.latest, terms, update)


def test_the_shares_of_fixed_weights_are_those_of_the_weighted_losses():
    report, watch = GradientReport(3), Watching()
    fit(Balanced(CASES["fixed"]), make_loader(5), max_epochs=1, callbacks=[watch, report])
    terms, update = watch.steps[3]
    weights, whole = {"fit": 1.0, "size": 0.01, "decay": 3.0}, flat(update)
    expected = {name: float(weights[name] * flat(one) @ whole / (whole @ whole)) for name, one in terms.items()}
    assert report.latest.shares == pytest.approx(expected, rel=1e-6)


def test_mtadams_shares_are_those_of_its_scales():
    report, watch, module = GradientReport(3), Watching(), Regression(make_mtadam)
    fit(module, make_loader(4), max_epochs=1, callbacks=[watch, report])
    terms, update = watch.steps[3]
    scales, whole = list(module.trainer.optimizers[0].scales().values()), flat(update)
    for index, (name, gradients) in enumerate(terms.items()):
        part = flat([one[index] * gradient for one, gradient in zip(scales, gradients, strict=True)])
        assert report.latest.shares[name] == pytest.approx(float(part @ whole / (whole @ whole)), rel=1e-9)


# Training is as without it


class Delicate(MultiTermLightningModule):
    """All that an extra backward pass could disturb: dropout, running statistics in a checkpoint, hooks that count."""

    def __init__(self, make_optimizer, balancer=None):
        super().__init__()
        self.same_numbers = balancer is not None  # some balancers want the same gradient each time
        self.network, self.make_optimizer = make_network(batch_norm=True), make_optimizer
        self.drop, self.called, self.fixed = nn.Dropout(0.3), 0, balancer
        self.network[0].weight.register_hook(self.count)
        self.network[0].bias.register_post_accumulate_grad_hook(self.count)

    def count(self, _):
        self.called += 1

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = checkpoint(self.head, x, use_reentrant=False, preserve_rng_state=self.same_numbers)
        output = self.network[3](self.network[2](hidden))
        return {
            "fit": (output - y).square().mean(),
            "size": 300 * output.abs().mean(),
            "decay": 1e-2 * self.network[0].weight.square().sum(),
        }

    def head(self, x):
        return self.drop(self.network[1](self.network[0](x)))

    def configure_balancer(self):
        return None if self.fixed is None else CASES[self.fixed].make()

    def configure_optimizers(self):
        return self.make_optimizer(self)


def trained(module, *callbacks, **options):
    torch.manual_seed(5)
    fit(module, make_loader(), max_epochs=1, callbacks=list(callbacks), **options)
    return module, torch.get_rng_state()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_bit_for_bit_with_any_optimizer(name, accumulate):
    if accumulate > 1 and name in ("mtadam, low_memory", "lbfgs"):
        pytest.skip("refused with any callback")
    options, make_optimizer = {"accumulate_grad_batches": accumulate}, OPTIMIZERS[name]
    with_it, numbers = trained(Delicate(make_optimizer), GradientReport(2), **options)
    without, expected = trained(Delicate(make_optimizer), **options)
    assert_same(with_it.network, without.network)
    if name != "lbfgs":  # whose state is not all tensors
        assert_same_state(with_it.trainer.optimizers[0], without.trainer.optimizers[0])
    assert torch.equal(numbers, expected)
    assert with_it.called == without.called
    for one, other in zip(with_it.network.buffers(), without.network.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name in CASES if "output" not in name])
def test_training_is_the_same_bit_for_bit_with_any_balancer(name):
    with_it, numbers = trained(Delicate(adam, name), GradientReport(2))
    without, expected = trained(Delicate(adam, name))
    assert_same(with_it.network, without.network)
    assert torch.equal(numbers, expected)
    assert with_it.called == without.called
    for key, value in without.balancer.state.items():
        assert torch.equal(with_it.balancer.state[key], value)


@pytest.mark.parametrize("make_optimizer", [adam, make_mtadam])
def test_a_gan_trains_the_same_bit_for_bit(make_optimizer):
    with_it, without = GAN(make_optimizer), GAN(make_optimizer)
    fit(with_it, make_loader(4), max_epochs=1, callbacks=[GradientReport(2)])
    fit(without, make_loader(4), max_epochs=1)
    assert_same(with_it, without)


class Passes(pl.Callback):
    """Counts calls of ``torch.autograd.grad`` by step."""

    def __init__(self, monkeypatch):
        self.counts, self.now, grad = [], 0, torch.autograd.grad

        def counted(*arguments, **options):
            self.now += 1
            return grad(*arguments, **options)

        monkeypatch.setattr(torch.autograd, "grad", counted)

    def on_train_batch_end(self, *_):
        self.counts.append(self.now)
        self.now = 0


def passes(monkeypatch, make_optimizer, *callbacks):
    with monkeypatch.context() as patch:
        counting = Passes(patch)
        fit(Regression(make_optimizer), make_loader(5), max_epochs=1, callbacks=[counting, *callbacks])
    return counting.counts


def test_adam_takes_one_more_pass_a_term_in_the_reports_steps_and_none_between(monkeypatch):
    assert passes(monkeypatch, adam) == [0] * 5
    assert passes(monkeypatch, adam, GradientReport(2)) == [3, 0, 3, 0, 3]


def test_mtadam_takes_no_pass_more_and_with_low_memory_one_a_term(monkeypatch):
    expected = passes(monkeypatch, make_mtadam)
    assert passes(monkeypatch, make_mtadam, GradientReport(2)) == expected
    more = [count + 3 * (step % 2 == 0) for step, count in enumerate(expected)]
    assert passes(monkeypatch, low_memory, GradientReport(2)) == more


@pytest.mark.parametrize("make_optimizer", [adam, make_mtadam, low_memory])
def test_no_gradient_is_held_after_its_steps(make_optimizer):
    held = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_):
            held.append([one.step.beside.gradients for one in report._followed])

    report = GradientReport(1)
    fit(Regression(make_optimizer), make_loader(3), max_epochs=1, callbacks=[Watch(), report])
    assert held == [[{}]] * 3


def test_batches_that_were_dropped_are_no_part_of_the_report():
    class Dropping(Regression):
        def __init__(self):
            super().__init__(adam)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for part in (batch, [one.flip(0) for one in batch]) if batch_idx == 0 else (batch,):
                optimizer.zero_grad()
                self.backward_terms(three_losses(self.network, part), optimizer)
            optimizer.step()

    report = GradientReport()
    fit(Dropping(), make_loader(1), max_epochs=1, callbacks=[report])
    expected = GradientReport()
    fit(Regression(adam), make_loader(1), max_epochs=1, callbacks=[expected])
    assert report.latest.norms == pytest.approx(expected.latest.norms, rel=1e-12)


def test_reentrant_checkpoints_are_refused_by_name():
    class Reentrant(Regression):
        def training_step(self, batch, batch_idx):
            x, y = batch
            output = checkpoint(self.network, x.requires_grad_(), use_reentrant=True)
            return {"fit": (output - y).square().mean(), "size": output.abs().mean()}

    with pytest.raises(ValueError, match="reentrant"):
        fit(Reentrant(adam), make_loader(1), max_epochs=1, callbacks=[GradientReport()])
