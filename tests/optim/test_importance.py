"""Importance that changes while training: equality with the oracles, and what is refused."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lightning_mtadam.graphs import CHANGES, LOOKS
from lightning_mtadam.optim import MTAdam
from tests.distributed.ranks import results, run_ranks
from tests.lightning_models import assert_same_state, make_loader, make_mtadam, make_network, three_losses
from tests.optim.streams import LENGTH, NAMES, TERMS, feed, layer_names, linear_losses, make, start, stream
from tests.oracles.naive_balance_every import NaiveBalanceEvery
from tests.oracles.naive_mtadam import NaiveMTAdam

STEPS = LENGTH
TOLERANCE = 1e-10
CHANGED = {
    0: {"b": 0.5},
    17: {"b": 0.1, "c": 3.0},
    40: {"b": 0.0},
    41: {"a": 0.0},
    45: {"a": 2.0, "b": 1.0},
    50: {"b": 0.01, "c": 0.0},
    57: {"c": 1.0},
}
"""What is set before which step; the others stay as they were."""


def importance_of(**changed):
    """As the groups say it: of all terms."""
    return {**dict.fromkeys(TERMS, 1.0), **changed}


def run(optimizer, parameters, steps=range(STEPS), changed=CHANGED, seed=0):
    for step, gradients in enumerate(stream(STEPS, seed)):
        if step in steps:
            if step in changed:
                optimizer.set_importance(changed[step])
            feed(optimizer, parameters, gradients)
            optimizer.step()


def assert_parameters(parameters, expected, tolerance=TOLERANCE):
    for ours, theirs, name in zip(parameters, expected, NAMES, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), np.asarray(theirs), rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("anchor", ["first", "b", "mean", "max", "unit", None])
@pytest.mark.parametrize("denominator", ["max", "mean", "own", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"rule": "module", "norm_init": "unbiased"}, {"low_memory": True}], ids=["", "module", "low_memory"]
)
def test_it_equals_the_oracle(anchor, denominator, options):
    options = {"anchor": anchor, "denominator": denominator, **options}
    if "low_memory" in options and (anchor in ("mean", "max") or denominator == "own"):
        pytest.skip("needs all gradients at once")
    parameters, optimizer = make(start(0), **options)
    run(optimizer, parameters)
    options.pop("low_memory", None)
    oracle = NaiveMTAdam(start(0), layer_names(options.pop("rule", "parameter")), TERMS, **options)
    for step, gradients in enumerate(stream(STEPS, 0)):
        oracle.importance = {**oracle.importance, **CHANGED.get(step, {})}
        oracle.step(gradients)
    assert_parameters(parameters, oracle.parameters)
    for layer, scales in optimizer.scales().items():
        expected = [oracle.scale[i, layer] for i in range(len(TERMS))]
        np.testing.assert_allclose(scales.numpy(), expected, rtol=1e-9, err_msg=layer)


@pytest.mark.parametrize("anchor", ["first", "b", "mean", "unit", None])
@pytest.mark.parametrize("every", [5, 50])
def test_light_steps_follow_at_once(every, anchor):
    parameters, optimizer = make(start(0), rule=None, balance_every=every, anchor=anchor)
    run(optimizer, parameters)
    oracle, light = NaiveBalanceEvery(start(0), TERMS, every, anchor=anchor), 0
    for step, gradients in enumerate(stream(STEPS, 0)):
        if step in CHANGED:
            oracle.importance = {**oracle.importance, **CHANGED[step]}
            oracle.scale = {term: oracle.importance.get(term, 1.0) * oracle.ratio(term) for term in oracle.scale}
        light += not oracle.step(gradients) and step in CHANGED
    assert light, "some changes come before light steps"
    assert_parameters(parameters, oracle.parameters)


@pytest.mark.slow
def test_compiled_it_is_the_same():
    options = {"denominator": "sum", "rule": "global", "norm_init": "unbiased"}
    (parameters, optimizer), (expected, eager) = make(start(0), compile=True, **options), make(start(0), **options)
    changed = {0: {"b": 0.5}, 3: {"b": 0.0}, 6: {"b": 2.0}, 8: {"b": 0.0}, 9: {"b": 0.3}}
    run(optimizer, parameters, range(12), changed)
    run(eager, expected, range(12), changed)
    assert_parameters(parameters, [p.detach() for p in expected], 1e-12)


@pytest.mark.parametrize("options", [{}, {"balance_every": 5, "rule": None}, {"denominator": "own"}, {"anchor": None}])
def test_set_before_the_first_step_it_is_the_constructors(options):
    wanted = {"b": 0.25, "c": 0.0}
    (parameters, optimizer), (expected, made) = make(start(0), **options), make(start(0), importance=wanted, **options)
    run(optimizer, parameters, range(30), {0: wanted})
    run(made, expected, range(30), {})
    assert_parameters(parameters, [p.detach() for p in expected], 0)
    assert_same_state(optimizer, made)


@pytest.mark.parametrize("denominator", ["max", "sum"])
def test_without_memory_a_step_is_that_of_an_optimizer_made_with_it(denominator):
    """With betas of zero moments remember nothing, and norms do not depend on importance."""
    wanted, options = {"b": 0.25}, {"betas": (0.0, 0.0, 0.9), "denominator": denominator, "lr": 1e-3}
    (parameters, optimizer), (expected, made) = make(start(0), **options), make(start(0), importance=wanted, **options)
    run(optimizer, parameters, range(20), {})
    run(made, expected, range(20), {})
    before, others = ([p.detach().clone() for p in found] for found in (parameters, expected))
    run(optimizer, parameters, [20], {20: wanted})
    run(made, expected, [20], {})
    moved, should = (
        [p.detach() - q for p, q in zip(now, then, strict=True)]
        for now, then in ((parameters, before), (expected, others))
    )
    assert_parameters(moved, should, 1e-12)


def test_at_zero_a_term_has_no_influence_and_comes_back_at_its_right_scale():
    """All is as if it were left out, but its norms, which are those of a run in which it was never silent."""
    parameters, optimizer = make(start(0), rule="global")
    run(optimizer, parameters, range(35, 55), {35: {"c": 0.0}})
    others, without = make(start(0), rule="global")
    for gradients in [*stream(STEPS, 0)][35:55]:
        feed(without, others, {term: found for term, found in gradients.items() if term != "c"})
        without.step()
    assert_parameters(parameters, [p.detach() for p in others], 1e-12)
    expected, never = make(start(0), rule="global")
    run(never, expected, range(35, 55), {})
    for layer, norms in never.gradient_norms().items():
        torch.testing.assert_close(optimizer.gradient_norms()[layer], norms, rtol=1e-12, atol=0)
    optimizer.set_importance({"c": 1.0})
    for one, mine in ((optimizer, parameters), (never, expected)):
        run(one, mine, [57], {})
    for layer, scales in never.scales().items():
        torch.testing.assert_close(optimizer.scales()[layer], scales, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"balance_every": 50, "rule": None}], ids=str)
def test_between_backward_and_step_it_waits_for_the_next_backward(options):
    (parameters, optimizer), (expected, plain) = make(start(0), **options), make(start(0), **options)
    for step, gradients in enumerate([*stream(STEPS, 0)][7:25]):
        feed(optimizer, parameters, gradients)
        optimizer.set_importance({"b": 0.1 * step})
        optimizer.step()
        plain.set_importance({"b": 0.1 * (step - 1) if step else 1.0})
        feed(plain, expected, gradients)
        plain.step()
        for layer, scales in plain.scales().items():
            assert torch.equal(optimizer.scales()[layer], scales)
    assert_parameters(parameters, [p.detach() for p in expected], 0)


def test_where_batches_accumulate_all_count_as_of_the_last():
    one, other = [*stream(STEPS, 0)][7:9]
    results = []
    for early in (True, False):
        parameters, optimizer = make(start(0))
        if early:
            optimizer.set_importance({"b": 0.1})
        feed(optimizer, parameters, one)
        optimizer.set_importance({"b": 0.1})
        optimizer.backward(linear_losses(parameters, other))
        optimizer.step()
        results.append([p.detach() for p in parameters])
    assert_parameters(*results, 1e-15)


@pytest.mark.parametrize("options", [{}, {"balance_every": 5, "rule": None}, {"low_memory": True}], ids=str)
@pytest.mark.parametrize("stop", [18, 43, 70])
def test_it_comes_back_from_a_checkpoint(options, stop, tmp_path):
    parameters, optimizer = make(start(0), importance={"c": 2.0}, **options)
    run(optimizer, parameters, range(stop))
    torch.save((parameters, optimizer.state_dict()), tmp_path / "saved")
    values, saved = torch.load(tmp_path / "saved", weights_only=True)
    others, resumed = make([p.detach().numpy().copy() for p in values], importance={"c": 5.0}, **options)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["importance"] == optimizer.param_groups[0]["importance"]
    run(optimizer, parameters, range(stop, STEPS))
    run(resumed, others, range(stop, STEPS))
    assert_parameters(others, [p.detach() for p in parameters], 0)
    assert_same_state(resumed, optimizer)


def test_a_checkpoint_from_before_it_was_kept_there_leaves_the_optimizers_own():
    parameters, optimizer = make(start(0), importance={"b": 0.25})
    run(optimizer, parameters, range(5), {})
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["importance"]
    _, other = make(start(0), importance={"c": 3.0})
    other.load_state_dict(saved)
    assert [group["importance"] for group in other.param_groups] == [importance_of(c=3.0)] * 2


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({"z": 1.0}, "The checkpoint does not fit: importance names the term 'z'"),
        ({"b": -1.0}, r"The checkpoint does not fit: importance\['b'\] must be a finite number"),
        (None, "The checkpoint does not fit: importance must be a mapping"),
    ],
)
def test_what_does_not_fit_in_a_checkpoint_is_refused(importance, message):
    parameters, optimizer = make(start(0), importance={"b": 0.25})
    run(optimizer, parameters, range(5), {})
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer)
    for group in saved["param_groups"]:
        group["importance"] = importance
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(saved)
    assert_same_state(optimizer, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_has_it_too_and_is_apart(copied):
    _, optimizer = make(start(0), importance={"b": 0.25})
    other = copied(optimizer)
    other.set_importance({"b": 4.0})
    assert optimizer.param_groups[0]["importance"] == importance_of(b=0.25)
    assert other.param_groups[1]["importance"] == importance_of(b=4.0)


INVALID = [
    ({"bb": 1.0}, ValueError, r"importance names the term 'bb', but the terms are \('a', 'b', 'c'\). Did you mean 'b'"),
    ({"b": -0.5}, ValueError, r"importance\['b'\] must be a finite number of at least 0, but got -0.5"),
    ({"b": math.inf}, ValueError, "but got inf"),
    ({"b": math.nan}, ValueError, "but got nan"),
    ({"b": "1"}, ValueError, "but got '1'"),
    ({"b": None}, ValueError, "but got None"),
    ({"b": torch.ones(2)}, ValueError, r"importance\['b'\] must be a finite number"),
    ({2: 1.0}, TypeError, "must be a non-empty string"),
    (0.5, TypeError, "importance must be a mapping of terms' names to numbers, but is a float. Write {'kl': 0.1}"),
    ([("b", 1.0)], TypeError, "but is a list of 1"),
    (None, TypeError, "but is None"),
]


@pytest.mark.parametrize(("importance", "error", "message"), INVALID)
def test_what_cannot_be_is_refused_and_nothing_is_changed(importance, error, message):
    parameters, optimizer = make(start(0), importance={"b": 0.25})
    with pytest.raises(error, match=message):
        optimizer.set_importance({"a": 7.0, **importance} if isinstance(importance, dict) else importance)
    assert [group["importance"] for group in optimizer.param_groups] == [importance_of(b=0.25)] * 2
    run(optimizer, parameters, range(3), {})
    assert optimizer._options.importance == importance_of(b=0.25)


@pytest.mark.parametrize(("importance", "error", "message"), INVALID)
def test_the_same_is_refused_where_a_group_was_edited(importance, error, message):
    parameters, optimizer = make(start(0), importance={"b": 0.25})
    run(optimizer, parameters, range(3), {})
    before = copy.deepcopy(optimizer.state)
    for group in optimizer.param_groups:
        group["importance"] = importance
    with pytest.raises(error, match=message):
        feed(optimizer, parameters, [*stream(4, 0)][3])
    assert optimizer._options.importance == importance_of(b=0.25)
    for one, other in zip(optimizer.state.values(), before.values(), strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_name_is_checked_with_the_first_losses_where_terms_are_not_known():
    w = nn.Parameter(torch.ones(2))
    optimizer = MTAdam([w])
    optimizer.set_importance({"kll": 0.1})
    with pytest.raises(ValueError, match=r"importance names the term 'kll'.*Did you mean 'kl'"):
        optimizer.backward({"fit": w.sum(), "kl": w.square().sum()})
    optimizer.param_groups[0]["importance"].pop("kll")
    optimizer.backward({"fit": w.sum(), "kl": w.square().sum()})
    optimizer.step()


def test_an_edit_of_the_group_counts():
    (parameters, optimizer), (expected, other) = make(start(0)), make(start(0))
    run(optimizer, parameters, range(20), {})
    run(other, expected, range(20), {})
    optimizer.param_groups[0]["importance"]["b"] = np.float64(0.25)  # one dict for all groups
    other.set_importance({"b": 0.25})
    run(optimizer, parameters, range(20, 30), {})
    run(other, expected, range(20, 30), {})
    assert_parameters(parameters, [p.detach() for p in expected], 0)
    assert_same_state(optimizer, other)


def test_an_edit_of_one_group_of_several_is_refused_and_set_importance_is_the_remedy():
    parameters, optimizer = make(start(0))
    optimizer.param_groups[1]["importance"] = {"b": 0.25}
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['importance'\] is {'b': 0.25}, but .* Call optimizer"):
        feed(optimizer, parameters, next(stream(1, 0)))
    optimizer.set_importance({"b": 0.25})
    run(optimizer, parameters, range(2), {})
    assert optimizer._options.importance == importance_of(b=0.25)


def test_groups_that_are_added_have_it_and_one_of_their_own_is_refused():
    _, optimizer = make(start(0))
    optimizer.set_importance({"b": 0.25})
    optimizer.param_groups[0]["importance"]["c"] = 2.0
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(2, dtype=torch.float64)))]})
    assert optimizer.param_groups[2]["importance"] == importance_of(b=0.25, c=2.0)
    with pytest.raises(ValueError, match=r"importance holds for the whole optimizer.*set_importance"):
        optimizer.add_param_group({"params": [("other", nn.Parameter(torch.ones(2)))], "importance": {"b": 1.0}})
    assert len(optimizer.param_groups) == 3
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    assert len(optimizer.scales()) == 0
    optimizer.set_importance({"b": 0.5})


def test_lightnings_wrapper_passes_it_on():
    parameters, optimizer = make(start(0))
    LightningOptimizer(optimizer).set_importance({"b": 0.25})
    run(optimizer, parameters, range(2), {})
    assert optimizer._options.importance == importance_of(b=0.25)
    assert f"importance: {importance_of(b=0.25)}" in repr(optimizer)


def test_nothing_is_made_anew_while_it_stays():
    parameters, optimizer = make(start(0))
    run(optimizer, parameters, range(3), {})
    tables = optimizer._kept[1].tables
    held = tables._importance
    run(optimizer, parameters, range(3, 6), {3: {"b": 1.0}, 4: {}})
    optimizer.set_importance({"b": 1.0})
    assert optimizer._kept[1].tables is tables
    run(optimizer, parameters, range(6, 8), {})
    torch.testing.assert_close(tables._importance, held)
    again = tables._importance
    run(optimizer, parameters, range(8, 10), {})
    assert tables._importance is again


# Ramps on the losses


def ramped(factor, options=None, steps=LOOKS * (CHANGES + 3)):
    """The warnings of a training whose second loss is ``factor(step, loss)``."""
    w = nn.Parameter(torch.ones(3))
    optimizer = MTAdam([w], **(options or {}))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in range(steps):
            optimizer.zero_grad()
            optimizer.backward({"fit": (w - 2).square().sum(), "kl": factor(step, w.square().sum())})
            optimizer.step()
    return [str(one.message) for one in found if "is multiplied by a number" in str(one.message)]


RAMPS = {
    "up": lambda step, loss: (step + 1) / 1000 * loss,
    "from zero": lambda step, loss: loss * (step / 1000),
    "down": lambda step, loss: 0.9**step * loss,
    "by epochs": lambda step, loss: (step // LOOKS) * loss,
    "a tensor": lambda step, loss: torch.tensor(step / 1000) * loss,
}


@pytest.mark.skipif(not hasattr(torch._C._autograd.SavedTensor, "data"), reason="torch does not show what it saved")
@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_on_a_loss_is_told_of_once(ramp):
    (message,) = ramped(RAMPS[ramp])
    assert message.startswith("losses['kl'] is multiplied by a number that changes from step to step")
    assert "set_importance({'kl': number})" in message


QUIET = {
    "none": lambda step, loss: loss,
    "constant": lambda step, loss: 0.1 * loss,
    "random": lambda step, loss: math.sin(step**2) * loss,
    "cycle": lambda step, loss: (step % (5 * LOOKS)) * loss,
    "learned": lambda step, loss: nn.Parameter(torch.tensor(float(step))) * loss,
    "divided": lambda step, loss: loss / 4,
}


@pytest.mark.parametrize("factor", QUIET)
def test_other_factors_are_not(factor):
    assert not ramped(QUIET[factor])


def test_without_balance_a_ramp_is_a_schedule():
    assert not ramped(RAMPS["up"], {"anchor": None})


def test_a_ramp_on_a_loss_goes_beyond_full_strength():
    """What docs/importance.md says of it: the average of the norms lags behind."""
    w, strengths = nn.Parameter(torch.ones(2, dtype=torch.float64)), []
    optimizer = MTAdam([w], lr=0.0)
    for step in range(300):
        factor = min(1.0, 0.01 * 1.1**step)
        optimizer.zero_grad()
        optimizer.backward({"fit": w[0], "kl": factor * w[1]})
        optimizer.step()
        strengths.append(factor * float(optimizer.scales()["parameter_0"][1]))
    assert strengths[0] == pytest.approx(1.0)
    assert max(strengths) > 1.5
    assert strengths[-1] == pytest.approx(1.0)


# Two ranks


def on_rank(rank, changed, options):
    network = make_network()
    optimizer = make_mtadam(network, **options)
    model = nn.parallel.DistributedDataParallel(network)
    for step, batch in enumerate([*make_loader(12)][rank::2]):
        if step in changed[rank]:
            optimizer.set_importance(changed[rank][step])
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch, model), model=model)
        optimizer.step()
    return dict(network.state_dict())


@pytest.mark.parametrize("options", [{}, {"balance_every": 4}, {"low_memory": True}], ids=str)
def test_two_ranks_equal_one_process(options, tmp_path):
    changed = {0: {"size": 0.5}, 2: {"size": 0.0}, 4: {"size": 3.0}}
    first, second = results(run_ranks(on_rank, tmp_path, [changed, changed], options))
    network = make_network()
    optimizer, batches = make_mtadam(network, **options), [*make_loader(12)]
    for step in range(6):
        if step in changed:
            optimizer.set_importance(changed[step])
        batch = [torch.cat(parts) for parts in zip(*batches[2 * step : 2 * step + 2], strict=True)]
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch))
        optimizer.step()
    for name, value in network.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("other", [{}, {"size": 0.25}], ids=["nothing", "another"])
def test_ranks_that_set_different_values_raise(step, other, tmp_path):
    changed = [{step: {"size": 0.5}}, {step: other}]
    for outcome in run_ranks(on_rank, tmp_path, changed, {}):
        assert outcome.error.startswith("ValueError: The ranks have different values of the option importance: rank 0")
        assert "as by set_importance, on all" in outcome.error


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_has_it_too(tmp_path):
    """It loads only the names that are there before."""
    networks = [make_network(), make_network()]
    optimizer, other = (make_mtadam(network, terms=("fit", "size", "decay")) for network in networks)
    for batch in make_loader(2):
        optimizer.zero_grad()
        optimizer.backward(three_losses(networks[0], batch))
        optimizer.step()
    optimizer.set_importance({"size": 0.25})
    dcp.save({"optimizer": get_optimizer_state_dict(networks[0], optimizer)}, checkpoint_id=tmp_path)
    found = {"optimizer": get_optimizer_state_dict(networks[1], other)}
    dcp.load(found, checkpoint_id=tmp_path)
    set_optimizer_state_dict(networks[1], other, optim_state_dict=found["optimizer"])
    assert other.param_groups[0]["importance"] == {"fit": 1.0, "size": 0.25, "decay": 1.0}
