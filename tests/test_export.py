"""Constant weights from a run: what they are, what they reproduce, and from what they can be had."""

import copy
import math
import pickle
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from lightning_mtadam import export_weights
from lightning_mtadam.balancers import GradNorm
from lightning_mtadam.export import ExportedWeights
from lightning_mtadam.optim import MTAdam
from lightning_mtadam.optim.state import AVERAGE_KEYS
from tests.lightning_models import (
    GAN,
    QUIET,
    Regression,
    adam,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
)
from tests.loops import take_step, train
from tests.optim.streams import LENGTH, SHAPES, feed, layer_names, make, start, stream

BATCHES = list(make_loader(20))
SLOPES = {"fit": 1.0, "size": 30.0, "sharper": 1e-3}


def slopes(network):
    """Losses whose gradients are the same at every step: linear, in directions of their own."""
    flat = torch.cat([p.flatten() for p in network.parameters()])
    index = torch.arange(len(flat), dtype=flat.dtype)
    return {name: slope * torch.cos(index + len(name)) @ flat for name, slope in SLOPES.items()}


def trained(losses=three_losses, steps=20, **options):
    network = make_network()
    optimizer = make_mtadam(network, **options)
    train(optimizer, (losses(network, batch) for batch in BATCHES[:steps]))
    return optimizer


def scaled(**factors):
    def losses(network, batch):
        output = network(batch[0])
        found = {
            "fit": (output - batch[1]).square().mean(),
            "size": output.abs().mean(),
            "sharp": (output - batch[1]).pow(4).mean(),
        }
        return {name: factors.get(name, 1.0) * loss for name, loss in found.items()}

    return losses


def test_one_term_has_the_weight_one():
    weights = export_weights(trained(lambda network, batch: {"fit": three_losses(network, batch)["fit"]}))
    assert (weights, weights.spread) == ({"fit": 1.0}, {"fit": 1.0})


@pytest.mark.parametrize("options", [{"layers": "global"}, {"balance_every": 5}], ids=str)
def test_constant_scales_of_the_whole_network_are_exported_as_they_are(options):
    network = make_network()
    optimizer = make_mtadam(network, **options)
    train(optimizer, (slopes(network) for _ in range(30)))
    weights = export_weights(optimizer)
    assert list(weights.values()) == pytest.approx(optimizer.scales()["global"].tolist(), rel=1e-14, abs=0)
    assert set(weights.spread.values()) == {1.0}
    assert weights["size"] < 0.1


def test_adam_on_the_weighted_sum_repeats_the_run_whose_scales_were_constant():
    balanced = make_network()
    optimizer = make_mtadam(balanced, layers="global", denominator="sum")
    train(optimizer, (slopes(balanced) for _ in range(30)))
    weights = export_weights(optimizer)
    plain = make_network()
    train(adam(plain), ({name: weights[name] * loss for name, loss in slopes(plain).items()} for _ in range(30)))
    for ours, theirs in zip(plain.parameters(), balanced.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"layers": "global"}, {"balance_every": 5}, {"low_memory": True}], ids=str)
@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("term", ["size", "sharp"])
def test_a_factor_on_a_loss_other_than_the_anchor_divides_its_weight(term, factor, options):
    expected = export_weights(trained(scaled(), **options))
    found = export_weights(trained(scaled(**{term: factor}), **options))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name] * (factor if name == term else 1) == pytest.approx(weight, rel=1e-9, abs=0)
        assert found.spread[name] == pytest.approx(expected.spread[name], rel=1e-9)


def scales_seen(steps=LENGTH, clip=None, **options):
    """The optimizer after a stream of gradients, and its scales in every step: [steps, L, I]."""
    parameters, optimizer = make(start(0), **options)
    seen = []
    for gradients in stream(steps, 0):
        feed(optimizer, parameters, gradients)
        if clip is not None:
            optimizer.clip_gradients(*clip)
        optimizer.step()
        seen.append(torch.stack(list(optimizer.scales().values())))
    return optimizer, torch.stack(seen)


@pytest.mark.parametrize("rule", ["parameter", "module", "group", "global"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anchor": "mean"},
        {"anchor": "unit", "update": "mean"},
        {"low_memory": True, "anchor": "b"},
        {"importance": {"b": 0.25, "c": 2.0}},
        {"balance_every": 5, "rule": "global"},
    ],
    ids=str,
)
def test_the_average_is_the_geometric_mean_of_the_scales_of_all_steps(rule, options):
    """Light steps count as well; a term that comes late, or reaches a layer late, counts from then on."""
    optimizer, seen = scales_seen(**{"rule": rule, "denominator": "sum", **options})
    reached = seen > 0
    expected = torch.where(reached, seen, 1).log().sum(0) / reached.sum(0)
    for weights, column in zip(optimizer.average_weights().values(), expected.exp().unbind(1), strict=True):
        torch.testing.assert_close(weights, column, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("limit", [(0.1, "norm"), (0.1, "value")], ids=str)
def test_clipping_does_not_enter_the_average(limit):
    (plain, seen), (clipped, seen_clipped) = scales_seen(), scales_seen(clip=limit)
    assert torch.equal(seen, seen_clipped) == (limit[1] == "value"), "clipping by norm shows in the scales"
    for term, weights in plain.average_weights().items():
        assert torch.equal(weights.nan_to_num(), clipped.average_weights()[term].nan_to_num())


def test_without_balance_the_average_is_the_importance():
    """Nan where the term never reached the layer, though its gradient there would have been multiplied so."""
    optimizer, _ = scales_seen(anchor=None, importance={"b": 0.5, "c": 0.0})
    averages = optimizer.average_weights()
    assert averages["b"].tolist() == pytest.approx([0.5, math.nan, 0.5, math.nan, 0.5, 0.5], nan_ok=True)
    weights = export_weights(optimizer)
    assert (weights, set(weights.spread.values())) == ({"a": 1.0, "b": 0.5, "c": 0.0}, {1.0})


def test_the_weight_is_the_mean_over_layers_by_their_elements():
    """Geometric, as is the spread. A layer that is private to a term is left out: Adam is blind to its weight."""
    sizes = torch.tensor([1.0, 3.0, 100.0])
    averages = {
        "a": torch.tensor([1.0, 1.0, 1.0]),
        "b": torch.tensor([2.0, 32.0, math.nan]),
    }
    source = SimpleNamespace(average_weights=lambda: averages, layer_sizes=lambda: sizes)
    weights = export_weights(source)
    mean = (math.log(2) + 3 * math.log(32)) / 4
    deviation = math.sqrt(((math.log(2) - mean) ** 2 + 3 * (math.log(32) - mean) ** 2) / 4)
    assert weights == pytest.approx({"a": 1.0, "b": math.exp(mean)})
    assert weights.spread == pytest.approx({"a": 1.0, "b": math.exp(deviation)})

    averages["a"] = torch.tensor([1.0, 1.0, 1e9])
    assert export_weights(source)["a"] == 1.0
    averages["a"] = torch.tensor([math.nan, math.nan, 7.0])
    assert export_weights(source)["a"] == pytest.approx(7.0), "it has no other layer"
    averages["a"] = torch.tensor([0.0, 1.0, 1.0])
    assert (export_weights(source)["a"], export_weights(source).spread["a"]) == (0.0, math.inf)


def test_sizes_of_layers_are_their_numbers_of_elements():
    _, optimizer = make(start(0), rule="module")
    numbers = [math.prod(shape) for shape in SHAPES]
    assert list(dict.fromkeys(layer_names("module"))) == ["net", "head"]
    assert optimizer.layer_sizes().tolist() == [sum(numbers[:4]), sum(numbers[4:])]


def test_a_layer_that_is_trained_in_part_at_first_has_the_average_of_all_steps():
    network = make_network()
    network[0].weight.requires_grad_(False)
    optimizer = make_mtadam(network, layers="module", terms=("fit", "size"))
    seen = []
    for index, (x, y) in enumerate(BATCHES):
        if index == 7:
            network[0].weight.requires_grad_(True)
        losses = three_losses(network, (x, y))
        take_step(optimizer, {name: losses[name] for name in optimizer.terms})
        seen.append(optimizer.scales()["0"][1].log())
    late = torch.stack(seen[7:])
    expected = (torch.stack(seen).sum() + late.sum()) / (len(seen) + len(late))  # of two parameters
    assert float(optimizer.average_weights()["size"][0].log()) == pytest.approx(float(expected), rel=1e-12)


def test_a_step_that_is_not_finite_is_not_counted():
    optimizer = trained(on_nonfinite="skip", steps=5)
    before = optimizer.average_weights()
    network = [p for group in optimizer.param_groups for p in group["params"]]
    with pytest.warns(UserWarning, match="A step was skipped"):
        take_step(optimizer, {"fit": math.inf * network[0].sum(), "size": network[0].sum(), "decay": network[0].sum()})
    for term, weights in optimizer.average_weights().items():
        assert torch.equal(weights.nan_to_num(), before[term].nan_to_num())


@pytest.mark.parametrize("options", [{}, {"balance_every": 3}, {"low_memory": True}], ids=str)
def test_resume_in_the_middle_exports_the_same_to_the_bit(options):
    network, resumed = make_network(), make_network()
    optimizer = make_mtadam(network, **options)
    other = make_mtadam(resumed, **options)
    for index, batch in enumerate(BATCHES):
        if index == 8:
            resumed.load_state_dict(network.state_dict())
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        take_step(optimizer, three_losses(network, batch))
        if index >= 8:
            take_step(other, three_losses(resumed, batch))
    ours, theirs = export_weights(optimizer), export_weights(other)
    assert (ours, ours.spread) == (theirs, theirs.spread)


def test_a_checkpoint_from_before_the_average_was_kept_begins_it():
    saved = copy.deepcopy(trained(steps=5).state_dict())
    for state in saved["state"].values():
        for key in AVERAGE_KEYS:
            del state[key]
    network = make_network()
    optimizer = make_mtadam(network)
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="none since a checkpoint was loaded that holds no average"):
        export_weights(optimizer)
    take_step(optimizer, three_losses(network, BATCHES[5]))
    scales = torch.stack(list(optimizer.scales().values()), 1)
    for weights, expected in zip(optimizer.average_weights().values(), scales, strict=True):
        torch.testing.assert_close(weights, torch.where(expected > 0, expected, math.nan), equal_nan=True)


def test_a_mean_in_fp32_keeps_its_digits_over_a_long_run():
    """A sum of the logarithms would be off by some per cent."""
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = MTAdam([parameter], terms=("a", "b"))
    take_step(optimizer, {"a": parameter.sum(), "b": 1e3 * parameter.sum()})
    optimizer.state[parameter]["log_scale_count"].fill_(1e6)
    for _ in range(100):
        take_step(optimizer, {"a": parameter.sum(), "b": 1e3 * parameter.sum()})
    assert export_weights(optimizer)["b"] == pytest.approx(1e-3, rel=1e-6)


class Weighted(Regression):
    """``Regression`` on the sum of its losses, each multiplied by a weight."""

    def __init__(self, weights, make_optimizer):
        super().__init__(make_optimizer)
        self.weights = weights

    def training_step(self, batch, batch_idx):
        return {name: self.weights[name] * loss for name, loss in three_losses(self.network, batch).items()}


def final_fit(network):
    x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    with torch.no_grad():
        return float((network(x) - y).square().mean())


@QUIET
def test_adam_trains_on_what_a_trainer_exports():
    """The term that drowns in the sum is fitted, nearly as well as by MTAdam."""
    loader = make_loader(20)
    balanced = Regression(partial(make_mtadam, importance={"size": 0.1, "decay": 0.1}))
    weights = export_weights(fit(balanced, loader, max_epochs=20))
    assert weights["fit"] == 1.0
    assert weights["size"] < 0.1
    drowned, exported = Weighted(dict.fromkeys(weights, 1.0), adam), Weighted(weights, adam)
    fit(drowned, loader, max_epochs=20)
    fit(exported, loader, max_epochs=20)
    assert final_fit(exported.network) < 0.9 * final_fit(drowned.network)
    assert final_fit(exported.network) < 1.1 * final_fit(balanced.network)


@QUIET
def test_a_trainer_stands_for_its_optimizer():
    trainer = fit(Regression(), make_loader())
    found, expected = export_weights(trainer), export_weights(trainer.optimizers[0])
    assert (found, found.spread) == (expected, expected.spread)
    wrapped = export_weights(trainer.lightning_module.optimizers())
    assert wrapped == expected


class Recorder(pl.Callback):
    """The weights that GradNorm has at the beginning of each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, *args):
        weights = module.balancer.term_weights()
        self.seen.append([float(weights.get(term, 1.0)) for term in ("fit", "size", "decay")])


@QUIET
def test_the_weights_of_gradnorm_are_their_geometric_mean_over_the_steps():
    module, recorder = Regression(adam), Recorder()
    module.balancer = GradNorm("network.0")
    weights = export_weights(fit(module, make_loader(), callbacks=[recorder]))
    expected = torch.tensor(recorder.seen, dtype=torch.float64).log().mean(0).exp()
    torch.testing.assert_close(torch.tensor(list(weights.values()), dtype=torch.float64), expected)
    assert weights.spread == {"fit": 1.0, "size": 1.0, "decay": 1.0}


@QUIET
def test_a_trainer_in_which_nothing_balances_is_refused():
    with pytest.raises(ValueError, match=r"its optimizers are \['Adam'\], and its module has no balancer"):
        export_weights(fit(Regression(adam), make_loader()))


@QUIET
def test_a_trainer_with_two_mtadams_is_refused():
    trainer = fit(GAN(), make_loader())
    with pytest.raises(ValueError, match=r"2 MTAdam optimizers.*export_weights\(trainer.optimizers\[0\]\)"):
        export_weights(trainer)
    assert export_weights(trainer.optimizers[1]).keys() == {"real", "fake"}


@pytest.mark.parametrize("source", [adam(make_network()), Regression(), None], ids=lambda source: type(source).__name__)
def test_what_has_no_weights_is_refused_by_its_type(source):
    with pytest.raises(TypeError, match=f"a method average_weights, but got a {type(source).__name__}"):
        export_weights(source)


@pytest.mark.parametrize("terms", [None, ("fit", "size", "decay")])
def test_a_run_without_a_step_is_refused(terms):
    with pytest.raises(ValueError, match="MTAdam has made no step yet"):
        export_weights(make_mtadam(make_network(), terms=terms))


def test_a_term_that_never_came_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'gan' has no weight to export.*leave it out of terms"):
        export_weights(trained(terms=("fit", "size", "decay", "gan")))


def test_weights_are_a_dict_that_shows_its_spread():
    weights = ExportedWeights({"fit": 1.0, "gan": 1 / 3}, {"fit": 1.0, "gan": 2.5})
    assert repr(weights) == "ExportedWeights({'fit': 1, 'gan': 0.3333}, spread={'fit': 1, 'gan': 2.5})"
    for same in (copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert (same, same.spread) == (weights, weights.spread)
