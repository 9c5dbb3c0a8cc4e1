"""Wrong losses raise naming the term, and change nothing."""

import math

import pytest

from lightning_mtadam import NonFiniteError
from tests.lightning_models import QUIET, Regression, adam, assert_same, fit, make_loader, make_mtadam, make_network
from tests.loops import by_hand

pytestmark = QUIET


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
