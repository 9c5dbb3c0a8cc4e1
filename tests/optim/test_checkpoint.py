"""Saving and resuming continue bit for bit; other checkpoints are refused by name."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mtadam.optim import MTAdam
from tests.lightning_models import assert_same_balance_weights, assert_same_state
from tests.loops import parameters_in, take_step
from tests.optim.streams import LENGTH, TERMS, follow, make, start, stream

OPTIONS = [
    {},
    {"amsgrad": True, "weight_decay": 0.1},
    {"denominator": "own", "norm_init": "unbiased"},
    {"rule": "module", "anchor": "mean"},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("at", [0, 1, 5, 22, 39])
def test_resume_continues_bitwise(tmp_path, at, options):
    """Before the first step, in the middle of a term's absence, and after late starts."""
    gradients = list(stream(LENGTH, 0))
    parameters, optimizer = make(start(0), **options)
    follow(optimizer, parameters, gradients[:at])
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    values = [p.detach().clone() for p in parameters]
    follow(optimizer, parameters, gradients[at:])

    resumed_parameters, resumed = make(start(0), **options)
    with torch.no_grad():
        for parameter, value in zip(resumed_parameters, values, strict=True):
            parameter.copy_(value)
    resumed.load_state_dict(torch.load(tmp_path / "saved", weights_only=True))
    assert resumed.terms == TERMS
    follow(resumed, resumed_parameters, gradients[at:])
    assert all(torch.equal(p, q) for p, q in zip(parameters, resumed_parameters, strict=True))
    assert_same_state(optimizer, resumed)
    assert_same_balance_weights(optimizer, resumed)


def test_loading_shares_no_memory_with_the_checkpoint():
    parameters, optimizer = make(start(0))
    follow(optimizer, parameters, stream(10, 0))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["state"])
    other_parameters, other = make(start(0))
    other.load_state_dict(saved)
    follow(other, other_parameters, stream(10, 1))
    for key, entry in kept.items():
        assert all(torch.equal(value, saved["state"][key][name]) for name, value in entry.items())


def test_loading_the_state_before_any_step_starts_anew():
    model = nn.Linear(2, 1)
    optimizer = MTAdam(model.named_parameters())
    fresh = copy.deepcopy(optimizer.state_dict())
    take_step(optimizer, {"fit": model(torch.ones(1, 2)).mean()})
    optimizer.load_state_dict(fresh)
    assert optimizer.terms == ()
    assert optimizer.balance_weights() == {}
    take_step(optimizer, {"other": model(torch.ones(1, 2)).mean()})
    assert optimizer.terms == ("other",)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_continues_bitwise(clone):
    parameters, optimizer = make(start(0), rule="module", anchor="b", importance={"c": 2.0})
    follow(optimizer, parameters, stream(10, 0))
    copied = clone(optimizer)
    copied_parameters = parameters_in(copied)
    follow(optimizer, parameters, stream(10, 1))
    follow(copied, copied_parameters, stream(10, 1))
    assert all(torch.equal(p, q) for p, q in zip(parameters, copied_parameters, strict=True))
    assert_same_state(optimizer, copied)
    assert_same_balance_weights(optimizer, copied)


def test_state_is_terms_plus_one_times_the_parameters():
    parameters, optimizer = make(start(0))
    follow(optimizer, parameters, stream(1, 0))
    size = sum(p.numel() for p in parameters)
    state = optimizer.state_dict()["state"].values()
    large = sum(entry[key].numel() for entry in state for key in ("exp_avg", "exp_avg_sq"))
    small = sum(v.numel() for entry in state for k, v in entry.items() if k not in ("exp_avg", "exp_avg_sq"))
    assert large == (len(TERMS) + 1) * size
    assert small == (5 * len(TERMS) + 1) * len(parameters)


def test_state_is_allocated_ahead_if_terms_are_known_ahead():
    given = make(start(0))[1]
    assert len(given.state_dict()["state"]) == 6
    assert all(weights.isnan().all() for weights in given.balance_weights().values())
    assert MTAdam(nn.Linear(2, 1).named_parameters()).state_dict()["state"] == {}


def test_frozen_parameters_have_no_state_until_they_are_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = MTAdam(model.named_parameters(), layers="module")
    before = model[0].weight.clone()
    for step in range(4):
        if step == 2:
            model[0].requires_grad_(True)
        output = model(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        take_step(optimizer, {"fit": output.mean(), "size": output[0].square().sum()})
        assert torch.equal(before, model[0].weight) == (step < 2)
        assert len(optimizer.state_dict()["state"]) == (2 if step < 2 else 4)
        assert optimizer.balance_weights()["0"].isnan().all() == (step < 2)


def test_a_parameter_frozen_later_stays_where_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = MTAdam(model.named_parameters(), weight_decay=0.1)
    for step in range(3):
        if step == 1:
            model[0].requires_grad_(False)
            kept = [p.clone() for p in model[0].parameters()]
        take_step(optimizer, {"fit": model(torch.ones(1, 2)).mean()})
    assert all(torch.equal(p, q) for p, q in zip(kept, model[0].parameters(), strict=True))


def assert_same_state_dicts(after, before):
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for key, entry in before["state"].items():
        assert entry.keys() == after["state"][key].keys()
        assert all(torch.equal(value, after["state"][key][name]) for name, value in entry.items())


def altered(change):
    parameters, optimizer = make(start(0))
    follow(optimizer, parameters, stream(3, 0))
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    return saved


def set_terms(saved, terms):
    for group in saved["param_groups"]:
        group["terms"] = terms


REFUSED = {
    "other terms": (lambda s: set_terms(s, ("a", "b", "z")), r"lacks \['c'\] and it has \['z'\]"),
    "other order": (lambda s: set_terms(s, ("a", "c", "b")), "order differs"),
    "fewer terms": (lambda s: set_terms(s, ("a", "b")), r"lacks \['c'\]"),
    "no MTAdam": (lambda s: [g.pop("terms") for g in s["param_groups"]], "not written by MTAdam"),
    "other layers": (lambda s: s["param_groups"][0].update(layers="global"), "layers='global'"),
    "other denominator": (lambda s: s["param_groups"][0].update(denominator="own"), "denominator='own'"),
    "other norms": (lambda s: s["param_groups"][0].update(norm_init="one"), "norm_init='one'"),
    "groups": (lambda s: s["param_groups"].pop(), r"groups of \[4\] parameters, the optimizer of \[4, 2\]"),
    "shape": (
        lambda s: s["state"][4].update(exp_avg=torch.ones(2, 5)),
        r"'exp_avg' .*'head.weight'.*\(2, 5\).*\(2, 4\)",
    ),
    "names": (
        lambda s: s["param_groups"][1].update(param_names=["head.bias", "head.weight"]),
        "parameter 'head.bias' where the optimizer has 'head.weight'",
    ),
    "entry": (lambda s: s["state"][1].pop("gradient_norm"), "no 'gradient_norm' for the parameter 'net.bias'"),
    "two betas": (
        lambda s: s["param_groups"][1].update(betas=(0.9, 0.999)),
        r"parameter group 1 does not fit: betas must be three numbers .*, but got \(0.9, 0.999\)",
    ),
    "bad lr": (lambda s: s["param_groups"][0].update(lr=-1.0), "group 0 does not fit: lr must be .*got -1.0"),
    **{
        f"no {key}": (
            lambda s, key=key: s["param_groups"][1].pop(key),
            f"parameter group 1 has no '{key}'.*add '{key}'",
        )
        for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "layers")
    },
    "no denominator": (
        lambda s: [group.pop("denominator") for group in s["param_groups"]],
        "does not say with which denominator it was written",
    ),
    "terms of one group": (lambda s: s["param_groups"][1].update(terms=("a",)), "groups have different terms"),
    "foreign entry": (
        lambda s: s["state"][1].update(momentum_buffer=torch.ones(4)),
        r"'momentum_buffer' for the parameter 'net.bias', which is no part of MTAdam's state. .*remove that entry",
    ),
    "foreign parameter": (lambda s: s["state"].update({17: {}}), "a state for 17, but its parameter groups hold no"),
    "foreign name": (lambda s: s["state"].update(extra={}), "a state for 'extra', but"),
    "foreign kind": (lambda s: s["state"].update({0: torch.ones(2)}), "state of 0 must be a dict, but is a Tensor"),
    "no number": (lambda s: s["state"][0].update(step=3), "no 'step' for the parameter 'net.weight'"),
    "no groups": (lambda s: s.pop("param_groups"), r"a dict without 'param_groups', with \['state'\]"),
    "no state": (lambda s: s.pop("state"), r"a dict without 'state'.*checkpoint\['optimizer_states'\]\[0\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(case):
    change, message = REFUSED[case]
    saved = altered(change)
    parameters, optimizer = make(start(0))
    follow(optimizer, parameters, stream(5, 1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.terms == TERMS
    assert_same_state_dicts(optimizer.state_dict(), before)


OTHERS = {
    "Adam": (torch.optim.Adam, "have two betas, like those of torch.optim.Adam"),
    "AdamW": (torch.optim.AdamW, "have two betas, like those of torch.optim.Adam"),
    "SGD": (lambda parameters: torch.optim.SGD(parameters, momentum=0.9), "look like those of torch.optim.SGD"),
    "RMSprop": (torch.optim.RMSprop, r"but have \['alpha', "),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_optimizers_checkpoint_is_refused_with_the_remedy(case):
    make, message = OTHERS[case]
    model = nn.Linear(2, 1)
    other = make(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    other.step()
    optimizer = MTAdam(model.parameters())
    take_step(optimizer, {"fit": model(torch.ones(1, 2)).mean()})
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"not written by MTAdam.*{message}.*Load only the weights"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.terms == ("fit",)
    assert_same_state_dicts(optimizer.state_dict(), before)


def test_what_is_no_state_dict_is_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"takes what optimizer.state_dict\(\) gave, but got a list"):
        MTAdam(model.parameters()).load_state_dict([])
    with pytest.raises(ValueError, match=r"without 'param_groups', with \['weight', 'bias'\]"):
        MTAdam(model.parameters()).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor": "z"}, r"the terms \('a', 'b', 'c'\), which do not fit the optimizer: anchor must be .*got 'z'"),
        ({"importance": {"z": 2.0}}, r"which do not fit the optimizer: importance names the term 'z'"),
    ],
)
def test_an_anchor_or_importance_that_the_checkpoints_terms_lack_is_refused_when_it_is_loaded(options, message):
    saved = altered(lambda saved: None)
    parameters = [torch.tensor(value, requires_grad=True) for value in start(0)]
    optimizer = MTAdam([{"params": parameters[:4]}, {"params": parameters[4:]}], **options)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.terms == ()
    assert not optimizer.state


def test_keys_of_schedulers_and_users_are_loaded_as_by_torch():
    parameters, optimizer = make(start(0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=50)
    optimizer.param_groups[1].update(swa_lr=0.1, mine={"deep": [1, 2]})
    for gradients in stream(5, 0):
        follow(optimizer, parameters, [gradients])
        schedule.step()
    saved = optimizer.state_dict()
    assert {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"} <= saved["param_groups"][0].keys()
    _, resumed = make(start(0))
    resumed.load_state_dict(saved)
    for group, right in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert {**group, "params": None} == {**right, "params": None}


NUMBERS = {
    "a numpy number": lambda: np.float32(0.5) / 4,
    "numpy's double": lambda: np.float64(0.125),
    "a number": lambda: 0.125,
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("options", [{}, {"balance_every": 3}, {"low_memory": True}, {"amsgrad": True}], ids=str)
def test_everything_that_is_saved_loads_with_weights_only(tmp_path, options, case):
    """Also numbers of numpy's, as schedules give them, anywhere in the groups."""
    torch.manual_seed(0)
    model, number = nn.Linear(2, 1), NUMBERS[case]()
    optimizer = MTAdam(model.named_parameters(), lr=number, betas=(number, 0.9, 0.9), **options)
    for _ in range(4):
        output = model(torch.ones(3, 2))
        take_step(optimizer, {"fit": output.mean(), "size": output.square().sum()})
    optimizer.param_groups[0]["mine"] = [number, {"deep": (number,)}]
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    loaded = torch.load(tmp_path / "saved", weights_only=True)
    (group,) = loaded["param_groups"]
    assert (group["lr"], group["betas"], group["mine"]) == (0.125, (0.125, 0.9, 0.9), [0.125, {"deep": (0.125,)}])
    other = MTAdam(model.named_parameters(), **options)
    other.load_state_dict(loaded)
    assert_same_state(optimizer, other)


def test_adam_fails_at_once_on_a_state_of_mtadams():
    """Nothing of ours runs there; a Trainer says more."""
    model = nn.Linear(2, 1)
    optimizer = MTAdam(model.parameters())
    take_step(optimizer, {"fit": model(torch.ones(1, 2)).mean()})
    adam, before = torch.optim.Adam(model.parameters()), model.weight.clone()
    adam.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="too many values to unpack"):
        adam.step()
    assert torch.equal(model.weight, before)


def test_losses_with_other_terms_than_the_checkpoints_are_refused():
    parameters, optimizer = make(start(0))
    follow(optimizer, parameters, stream(3, 0))
    model = [torch.tensor(v, requires_grad=True) for v in start(0)]
    resumed = MTAdam([{"params": model[:4]}, {"params": model[4:]}])
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"'z', but the terms are \('a', 'b', 'c'\)"):
        resumed.backward({"z": model[0].sum()})
