"""Wrong losses raise naming the term, or what was returned, and what to write; and change nothing."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch

from lightning_mtadam import MTAdam, NonFiniteError
from lightning_mtadam.balancers import FixedWeights, MetaBalance
from tests.lightning_models import (
    QUIET,
    Regression,
    SumRegression,
    adam,
    assert_same,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
    total,
)
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


# What is returned, and what is given as a term, of every kind


class Balanced(Regression):
    """With a balancer, and Adam."""

    def __init__(self):
        super().__init__(adam)

    def configure_balancer(self):
        return MetaBalance()


MODULES = {"MTAdam": Regression, "a balancer": Balanced, "Adam": lambda: Regression(adam)}
with_all = pytest.mark.parametrize("make_module", MODULES.values(), ids=MODULES)
in_both_modes = pytest.mark.parametrize("automatic", [True, False])


def train(module, spoil, *, automatic=True, **options):
    """Train on the losses as ``spoil`` makes them of the three, which it gets by name, and of ``total``."""
    module.automatic_optimization = automatic

    def training_step(batch, batch_idx):
        losses = three_losses(module.network, batch)
        losses = spoil(losses)
        if automatic:
            return losses
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.backward_terms(losses, optimizer)
        optimizer.step()
        return None

    module.training_step = training_step
    return fit(module, make_loader(3), max_epochs=1, **options)


KINDS = {
    "list": (
        lambda fit: [fit, fit],
        TypeError,
        r"is a list of 2\. Give each of its losses a name of its own, or add them up: sum\(",
    ),
    "tuple": (lambda fit: (fit,), TypeError, "is a tuple of 1. Give each of its losses a name of its own"),
    "None": (lambda fit: None, TypeError, r"is None\. .* leave it out, or give a loss of zero: torch.zeros\(\(\)\)"),
    "float": (
        lambda fit: fit.item(),
        TypeError,
        r"is a float\. Do not call \.item\(\) on it; .*log it instead: self\.log\('extra',",
    ),
    "int": (lambda fit: 3, TypeError, r"is a int\. Do not call \.item\(\)"),
    "numpy's number": (lambda fit: fit.detach().numpy()[()], TypeError, r"is a float64\. Do not call \.item\(\)"),
    "dict": (
        lambda fit: {"g": fit, "d": fit},
        TypeError,
        r"is a dict of \('g', 'd'\)\. Put its losses beside the others.*\{'extra_g': \.\.\., 'extra_d': \.\.\.\}",
    ),
    "string": (lambda fit: "low", TypeError, r"is a str\. Leave it out of the losses"),
    "whole number": (
        lambda fit: torch.tensor(3),
        TypeError,
        r"has dtype torch\.int64\. .*log it instead: self\.log\('extra',",
    ),
    "metric": (
        lambda fit: fit.detach() + 1,
        ValueError,
        r"has no graph.*leave it out of the losses and log it instead: self\.log\('extra',",
    ),
}
"""What a term called "extra" is, the error, and its message. The metric is DETR's ``cardinality_error``."""


@with_all
@in_both_modes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_no_loss_is_told_by_its_key_and_kind_and_what_to_write(make_module, automatic, kind, late):
    make, error, message = KINDS[kind]
    module, steps = make_module(), []

    def spoil(losses):
        steps.append(1)
        return losses if late and len(steps) == 1 else {**losses, "extra": make(losses["fit"])}

    with pytest.raises(error, match=r"losses\['extra'\].*" + message) as caught:
        train(module, spoil, automatic=automatic)
    assert (".item()" in str(caught.value)) is (kind in ("float", "int", "numpy's number"))
    assert len(steps) == 1 + late
    if not late:
        assert_same(module.network, make_network())


OUTPUTS = {
    "list": (lambda losses: list(losses.values()), "a list of 3"),
    "tuple": (lambda losses: tuple(losses.values()), "a tuple of 3"),
    "number": (lambda losses: losses["fit"].item(), r"a float.*Do not call \.item\(\) on a loss"),
    "string": (lambda losses: "loss", "a str"),
}


@with_all
@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_that_holds_no_losses_is_told_by_its_kind_and_what_to_return(make_module, kind):
    make, message = OUTPUTS[kind]
    module = make_module()
    with pytest.raises(TypeError, match=f"training_step returned {message}") as caught:
        train(module, make)
    assert "Return a dict of named scalar losses, e.g. {'reconstruction': loss, 'kl': kl}" in str(caught.value)
    assert (".item()" in str(caught.value)) is (kind == "number")
    assert_same(module.network, make_network())


@with_all
@pytest.mark.parametrize("kind", OUTPUTS)
def test_backward_terms_tells_what_it_was_given_in_place_of_a_dict(make_module, kind):
    make, message = OUTPUTS[kind]
    module = make_module()
    with pytest.raises(TypeError, match=f"losses must be a mapping.*but is {message.split('.*')[0]}.*Write them as"):
        train(module, make, automatic=False)
    assert_same(module.network, make_network())


@with_all
@pytest.mark.parametrize("value", [None, 2.0, [], {"a": 1}], ids=str)
def test_a_loss_under_its_key_that_is_none_is_told(make_module, value):
    with pytest.raises(TypeError, match=r"training_step returned \('loss', 'note'\): 'loss' is (None|a )"):
        train(make_module(), lambda losses: {"loss": value, "note": 1})


@with_all
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_none_skips_the_batch(make_module):
    module = make_module()
    train(module, lambda losses: None)
    assert_same(module.network, make_network())


@with_all
def test_an_empty_dict_is_told(make_module):
    with pytest.raises(ValueError, match=r"losses is empty. Give at least one named loss"):
        train(make_module(), lambda losses: {})


@in_both_modes
@pytest.mark.parametrize("name", ["MTAdam", "a balancer"])
def test_a_term_that_comes_late_is_told_with_what_to_write(automatic, name):
    steps = []

    def spoil(losses):
        steps.append(1)
        return losses if len(steps) == 1 else {**losses, "perceptual": losses["fit"] * 2}

    with pytest.raises(ValueError, match=r"'perceptual', but the terms are \('fit', 'size', 'decay'\)") as caught:
        train(MODULES[name](), spoil, automatic=automatic)
    assert "MTAdam(..., terms=(...)), here terms=('fit', 'size', 'decay', 'perceptual')" in str(caught.value)
    assert "A balancer takes terms= as well." in str(caught.value)


# Lightning's idiom


def summed(losses):
    """The sum under Lightning's key, and its terms beside it for the logs, all with their graphs."""
    return {"loss": total(losses), "rec": losses["fit"], "kl": losses["size"]}


def one_of_two(losses):
    return {"loss": losses["fit"], "kl": losses["size"]}


def nested(losses):
    return {"loss": total(losses), "terms": {"rec": losses["fit"], "kl": [losses["size"][None]]}}


IDIOMS = {
    "the sum and its terms": (summed, "('loss', 'rec', 'kl')", "{'rec': rec, 'kl': kl}"),
    "one of the terms": (one_of_two, "('loss', 'kl')", "{'main': loss, 'kl': kl}"),
    "the terms in a dict": (nested, "('loss', 'terms')", "{'terms': terms}"),
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_terms_beside_a_loss_are_told_of_once_with_what_to_return(idiom):
    spoil, returned, instead = IDIOMS[idiom]
    with pytest.warns(UserWarning, match="trains 'loss' alone") as caught:
        train(Regression(), spoil)
    (message,) = [str(one.message) for one in caught if "trains 'loss' alone" in str(one.message)]
    assert f"training_step returned {returned}" in message
    assert instead in message


@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_balancer_refuses_terms_beside_a_loss_with_what_to_return(idiom):
    spoil, returned, instead = IDIOMS[idiom]
    with pytest.raises(TypeError, match="MetaBalance balances named losses") as caught:
        train(Balanced(), spoil)
    assert f"training_step returned {returned}, one loss" in str(caught.value)
    assert instead in str(caught.value)


def test_a_balancer_refuses_one_loss():
    with pytest.raises(TypeError, match=r"returned one loss, a Tensor\. Return a dict of named scalar losses"):
        train(Balanced(), total)
    with pytest.raises(
        TypeError, match=r"returned \('loss', 'logits'\), one loss\. Return a dict of named scalar losses"
    ):
        train(Balanced(), lambda losses: {"loss": total(losses), "logits": torch.ones(3)})


@pytest.mark.parametrize(
    ("make_module", "beside"),
    [
        (lambda: Regression(adam), lambda losses: losses),
        (Regression, lambda losses: {name: loss.detach() for name, loss in losses.items()}),
        (Regression, lambda losses: {"logits": losses["fit"].expand(3), "note": "kept", "accuracy": 0.5}),
    ],
    ids=["Adam, as everybody does", "detached", "no scalars"],
)
def test_what_lies_beside_a_loss_rightly_is_no_matter(make_module, beside):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training_step returned")
        train(make_module(), lambda losses: {"loss": total(losses), **beside(losses)})


@with_all
def test_a_sum_beside_its_terms_in_backward_terms_is_told_of_once(make_module):
    with pytest.warns(UserWarning, match="'loss' is one more term") as caught:
        train(make_module(), summed, automatic=False)
    (message,) = [str(one.message) for one in caught if "one more term" in str(one.message)]
    assert message.startswith("backward_terms was given ('loss', 'rec', 'kl')")
    assert "{'rec': rec, 'kl': kl}" in message


# A plain LightningModule


class Plain(SumRegression):
    """Without what makes gradients of the terms."""

    def __init__(self, output=total, make_optimizer=make_mtadam):
        super().__init__(make_optimizer)
        self.output = output

    def training_step(self, batch, batch_idx):
        return self.output(three_losses(self.network, batch))


@pytest.mark.parametrize("output", [total, lambda losses: {"loss": total(losses)}, summed])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}], ids=str)
def test_a_plain_module_with_mtadam_is_told_which_class_to_take(output, options):
    module = Plain(output)
    with pytest.raises(RuntimeError, match=r"In Lightning return \{'name': loss\} from a MultiTermLightningModule"):
        fit(module, make_loader(), **options)
    assert_same(module.network, make_network())


def test_a_plain_module_in_manual_optimization_may_call_mtadam_by_itself():
    class Manual(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network, self.automatic_optimization = make_network(), False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            optimizer.backward(three_losses(self.network, batch))
            optimizer.step()

        def configure_optimizers(self):
            return MTAdam(self.network.named_parameters(), lr=1e-2)

    module = Manual()
    fit(module, make_loader())
    assert_same(module.network, by_hand()[0])


def test_names_of_fixed_weights_are_its_terms():
    class Fixed(Balanced):
        def configure_balancer(self):
            return FixedWeights({"fit": 1.0, "size": 2.0})

    with pytest.raises(ValueError, match=r"'decay', but the terms are \('fit', 'size'\)"):
        train(Fixed(), lambda losses: losses)
