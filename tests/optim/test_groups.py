"""Groups that are assigned, replaced or changed by hand count from the next use on; or they are refused by name."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_mtadam.optim import MTAdam
from tests.loops import take_step

X = torch.arange(12.0).reshape(4, 3) / 7
MODES = {
    "default": {},
    "terms given": {"terms": ("sq", "ab")},
    "light steps": {"balance_every": 3},
    "low memory": {"low_memory": True},
    "own": {"denominator": "own", "layers": "module"},
}
modes = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def losses(*modules):
    output = X.to(next(modules[0].parameters()).dtype)
    for module in modules:
        output = module(output)
    return {"sq": (output - 1).square().mean(), "ab": 9 * output.abs().mean()}


def trained(steps=2, **options):
    model = network()
    optimizer = MTAdam(model.named_parameters(), **{"lr": 0.1, **options})
    for _ in range(steps):
        take_step(optimizer, losses(model))
    return model, optimizer


def values(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def assert_same_snapshot(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, entries in one["state"].items():
        assert all(torch.equal(value, other["state"][index][key]) for key, value in entries.items())


@modes
def test_replacing_the_group_by_a_bare_one_is_only_a_new_learning_rate(options):
    """What is missing are the defaults, and what is counted goes on."""
    (model, optimizer), (other, kept) = trained(**options), trained(**options)
    optimizer.param_groups[0] = {"params": list(model.parameters()), "lr": 0.5}
    kept.param_groups[0]["lr"] = 0.5
    for _ in range(5):
        take_step(optimizer, losses(model))
        take_step(kept, losses(other))
    assert all(map(torch.equal, values(model), values(other)))
    assert optimizer.param_groups[0]["steps"] == 7
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999, 0.9)
    assert list(optimizer.balance_weights()) == list(kept.balance_weights())


@modes
def test_groups_that_are_assigned_in_another_order_move_each_parameter_as_before(options):
    (model, optimizer), (other, kept) = trained(**options), trained(**options)
    order = list(model.parameters())[::-1]
    optimizer.param_groups = [{"params": order[:1], "lr": 0.1}, {"params": order[1:], "lr": 0.1}]
    take_step(optimizer, losses(model))
    take_step(kept, losses(other))
    for one, same in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(one, same)  # norms of a joint layer are added up in another order


@modes
def test_a_parameter_that_is_taken_out_stays_and_one_that_is_put_in_begins_anew(options):
    model, optimizer = trained(**options)
    first, *rest = model.parameters()
    optimizer.param_groups[0]["params"] = rest
    before = values(model)
    take_step(optimizer, losses(model))
    moved = [not torch.equal(a, b) for a, b in zip(before, values(model), strict=True)]
    assert moved == [False, True, True, True]
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["0.bias", "1.weight", "1.bias"]
    assert sorted(saved["state"]) == [0, 1, 2]
    optimizer.param_groups.append({"params": [first], "param_names": ["0.weight"], "lr": 0.01})
    take_step(optimizer, losses(model))
    # The first step of Adam is of the learning rate's size: of MTAdam, up to twice as long with two terms.
    assert 0.005 <= float((first - before[0]).detach().abs().max()) <= 0.0201
    assert optimizer.state_dict()["param_groups"][1]["param_names"] == ["0.weight"]
    assert [group["steps"] for group in optimizer.param_groups] == [4, 4]


def test_names_follow_their_parameters():
    _, optimizer = trained()
    optimizer.param_groups[0]["params"].reverse()
    weights = optimizer.balance_weights()
    assert list(weights) == ["1.bias", "1.weight", "0.bias", "0.weight"]
    assert all(map(torch.equal, weights.values(), reversed(trained()[1].balance_weights().values())))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(weights)


def test_a_new_network_in_the_place_of_the_old_takes_its_names():
    _, optimizer = trained()
    model = network()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    take_step(optimizer, losses(model))
    assert list(optimizer.balance_weights()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert len(optimizer.state) == 4


@modes
def test_what_was_assigned_is_saved_copied_and_goes_on_bit_for_bit(options):
    model, optimizer = trained(**options)
    parameters = list(model.parameters())
    optimizer.param_groups = [{"params": parameters[2:]}, {"params": parameters[:2], "lr": 0.2}]
    for clone in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        assert_same_snapshot(clone(optimizer).state_dict(), optimizer.state_dict())
    other = network()
    other.load_state_dict(model.state_dict())
    members = dict(other.named_parameters())
    groups = [["1.weight", "1.bias"], ["0.weight", "0.bias"]]
    resumed = MTAdam([{"params": [(name, members[name]) for name in names]} for names in groups], **options)
    resumed.load_state_dict(snapshot(optimizer))
    for _ in range(4):
        take_step(optimizer, losses(model))
        take_step(resumed, losses(other))
    assert all(map(torch.equal, values(model), values(other)))


def test_groups_may_be_assigned_between_steps_but_not_between_backward_and_step():
    model, optimizer = trained()
    before = values(model)
    optimizer.backward(losses(model))
    optimizer.param_groups = [{"params": list(model.parameters())[1:]}]
    with pytest.raises(RuntimeError, match=r"param_groups has changed between backward\(\) and step\(\)"):
        optimizer.step()
    assert all(map(torch.equal, values(model), before))
    take_step(optimizer, losses(model))
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[1].weight, before[2])


def test_a_group_that_is_appended_between_backward_and_step_waits_for_its_gradients():
    model, optimizer = trained()
    head = nn.Linear(2, 2)
    before = head.weight.clone()
    optimizer.backward(losses(*model))
    optimizer.param_groups.append({"params": list(head.parameters())})
    optimizer.step()
    assert torch.equal(head.weight, before)
    take_step(optimizer, losses(*model, head))
    assert not torch.equal(head.weight, before)


def one():
    return nn.Parameter(torch.ones(2))


ASSIGNED = {
    "none": (lambda p: [], ValueError, "param_groups is empty. Assign at least one group"),
    "no dict": (lambda p: [p], TypeError, r"param_groups\[0\] must be a dict, .* but is a list"),
    "no params": (
        lambda p: [{"params": p}, {"lr": 0.1}],
        ValueError,
        r"\[1\] has no 'params', but \['lr'\]",
    ),
    "a generator": (
        lambda p: [{"params": iter(p)}],
        TypeError,
        "a list of parameters, but is a list_iterator",
    ),
    "a tensor": (lambda p: [{"params": p[0]}], TypeError, "must be a list of parameters, but is a Parameter"),
    "pairs": (lambda p: [{"params": [("w", p[0])]}], TypeError, "but is a list with a tuple"),
    "twice": (lambda p: [{"params": p}, {"params": p[:1]}], ValueError, "in more than one parameter group"),
    "two betas": (lambda p: [{"params": p, "betas": (0.9, 0.999)}], ValueError, "betas must be three numbers"),
    "lr": (lambda p: [{"params": p, "lr": -1.0}], ValueError, "lr must be a finite number of at least 0"),
    "option": (lambda p: [{"params": p, "anchor": "mean"}], ValueError, "anchor holds for the whole optimizer"),
    "terms": (lambda p: [{"params": p, "terms": ("z",)}], ValueError, "terms holds for the whole optimizer"),
    "taken": (
        lambda p: [{"params": p, "param_names": ["a", "b", "c", "a"]}],
        ValueError,
        "Two parameters are named 'a'. Give them different names",
    ),
}


@pytest.mark.parametrize("case", ASSIGNED)
def test_groups_that_cannot_be_are_refused_by_name_and_change_nothing(case):
    make, error, message = ASSIGNED[case]
    model, optimizer = trained()
    groups, before, kept = optimizer.param_groups, values(model), snapshot(optimizer)
    optimizer.param_groups = make(list(model.parameters()))
    with pytest.raises(error, match=message):
        optimizer.backward(losses(model))
    assert all(map(torch.equal, values(model), before))
    optimizer.param_groups = groups
    assert_same_snapshot(snapshot(optimizer), kept)
    take_step(optimizer, losses(model))


TAKEN = {
    "of another": ({}, lambda: {"params": [("0.weight", one())]}, "Two parameters are named '0.weight'"),
    "of its own": ({}, lambda: {"params": [("w", one()), ("w", one())]}, "Two parameters are named 'w'"),
    "as a key": ({}, lambda: {"params": [one()], "param_names": ["1.bias"]}, "Two parameters are named '1.bias'"),
    "wrapped": ({}, lambda: {"params": [("module.0.bias", one())]}, "Two parameters are named '0.bias'"),
    "terms given": (MODES["terms given"], lambda: {"params": [("0.weight", one())]}, "named '0.weight'"),
    "modules": ({"layers": "module"}, lambda: {"params": [("0.weight", one())]}, "named '0.weight'"),
    "a group's": (
        {"layers": "group"},
        lambda: {"params": [one()], "name": "group_0"},
        "Two parameter groups are named 'group_0'",
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_name_that_is_taken_is_refused_when_it_is_added(case):
    options, make, message = TAKEN[case]
    model, optimizer = trained(**options)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(make())
    assert_same_snapshot(snapshot(optimizer), before)
    take_step(optimizer, losses(model))
    optimizer.add_param_group({"params": [("other", one())], "name": "other"})


def test_names_that_nothing_is_called_by_may_be_taken():
    model, optimizer = trained(layers="global")
    optimizer.add_param_group({"params": [("0.weight", one())], "name": "group_0"})
    take_step(optimizer, losses(model))


def test_named_parameters_may_come_to_others_without_names():
    model = network()
    optimizer = MTAdam(model[0].parameters())
    optimizer.add_param_group({"params": [(f"head.{name}", one) for name, one in model[1].named_parameters()]})
    take_step(optimizer, losses(model))
    assert list(optimizer.balance_weights()) == ["parameter_0", "parameter_1", "head.weight", "head.bias"]


def test_what_torch_refuses_leaves_no_trace():
    model = network()
    optimizer = MTAdam(model[0].parameters())
    before = snapshot(optimizer)
    for params, error in (([("w", one() * 2)], ValueError), ({one()}, TypeError), ([("w", one()), one()], ValueError)):
        with pytest.raises(error):
            optimizer.add_param_group({"params": params})
    assert_same_snapshot(snapshot(optimizer), before)


@modes
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("at", [0, 1])
def test_a_group_without_parameters_changes_nothing(options, named, at):
    if options.get("layers") == "module" and not named:
        pytest.skip("modules need names")

    def made(model, empty):
        groups = [{"params": list(model.named_parameters() if named else model.parameters())}]
        groups[at:at] = [{"params": []}] if empty else []
        return MTAdam(groups, lr=0.1, **options)

    model, other = network(), network()
    optimizer, plain = made(model, empty=True), made(other, empty=False)
    for _ in range(3):
        take_step(optimizer, losses(model))
        take_step(plain, losses(other))
    resumed = made(model, empty=True)
    resumed.load_state_dict(snapshot(optimizer))
    take_step(resumed, losses(model))
    take_step(plain, losses(other))
    assert all(map(torch.equal, values(model), values(other)))
    for read in (MTAdam.balance_weights, MTAdam.scales, MTAdam.gradient_norms):
        found, right = read(resumed), read(plain)
        assert found.keys() == right.keys()
        assert all(map(torch.equal, found.values(), right.values()))
    assert torch.equal(resumed.layer_sizes(), plain.layer_sizes())


def test_an_empty_group_can_be_filled():
    model, optimizer = trained()
    head = nn.Linear(2, 2)
    optimizer.add_param_group({"params": []})
    optimizer.param_groups[1]["params"] = list(head.parameters())
    before = head.weight.clone()
    take_step(optimizer, losses(*model, head))
    assert not torch.equal(head.weight, before)


@modes
def test_lazy_parameters_get_their_state_once_they_have_a_shape(options):
    """With the terms given, too, where the state of the others is made ahead."""

    def made(first, second):
        torch.manual_seed(0)
        model = nn.Sequential(first(), second())
        return model, MTAdam(model.named_parameters(), lr=0.1, **options)

    lazy, optimizer = made(lambda: nn.LazyLinear(5), lambda: nn.Linear(5, 2))
    assert len(optimizer.state) == (2 if "terms" in options else 0)
    assert optimizer.layer_sizes().sum() == 12
    lazy(X)
    plain, other = made(lambda: nn.Linear(3, 5), lambda: nn.Linear(5, 2))
    plain.load_state_dict(lazy.state_dict())
    for _ in range(3):
        take_step(optimizer, losses(lazy))
        take_step(other, losses(plain))
    assert all(map(torch.equal, values(lazy), values(plain)))
    assert_same_snapshot(snapshot(optimizer), snapshot(other))


@modes
def test_a_lazy_parameter_may_wait_for_longer_than_the_first_step(options):
    model, late = network(), nn.LazyLinear(4)
    named = [*model.named_parameters(), *((f"late.{name}", one) for name, one in late.named_parameters())]
    optimizer = MTAdam(named, lr=0.1, **options)
    other, _ = trained(2, **options)
    for _ in range(2):
        take_step(optimizer, losses(model))
    assert all(map(torch.equal, values(model), values(other)))
    late(torch.ones(1, 2))
    before = late.weight.clone()
    take_step(optimizer, losses(*model, late))
    assert not torch.equal(late.weight, before)
    assert len(optimizer.state) == 6


def test_a_state_for_lazy_parameters_is_refused_with_what_comes_first():
    model = nn.LazyLinear(5)
    optimizer = MTAdam([*model.parameters(), one(), one()])
    with pytest.raises(ValueError, match="'parameter_0' has no shape yet: load the network's weights"):
        optimizer.load_state_dict(trained()[1].state_dict())


CHANGED = {
    "double": (lambda model: model.double(), r"'0.weight' is of shape \(5, 3\) and torch.float64.*torch.float32"),
    "bfloat16": (lambda model: model.bfloat16(), "torch.bfloat16, but its state .*torch.float32"),
    "half": (lambda model: model.half(), "torch.float16, but its state .*torch.float32"),
    "one": (
        lambda model: setattr(model[1].bias, "data", model[1].bias.data.double()),
        r"'1.bias' is of shape \(2,\) and torch.float64",
    ),
}


@modes
@pytest.mark.parametrize("case", CHANGED)
def test_a_dtype_that_changes_after_the_first_step_is_refused_before_anything_is_changed(case, options):
    change, message = CHANGED[case]
    model, optimizer = trained(**options)
    kept = copy.deepcopy(list(optimizer.state.values()))
    change(model)
    before = values(model)

    def step():
        optimizer.zero_grad()
        optimizer.backward({"sq": sum(p.double().sum() ** 2 for p in model.parameters()), "ab": model[1].bias.sum()})
        optimizer.step()

    for _ in range(2):  # also if it is tried again
        with pytest.raises(ValueError, match=message) as error:
            step()
    assert "optimizer.state.clear()" in str(error.value)
    assert all(map(torch.equal, values(model), before))
    for entries, others in zip(kept, optimizer.state.values(), strict=True):
        assert all(torch.equal(value, others[key]) for key, value in entries.items())
    optimizer.state.clear()  # the remedy
    step()
    assert not any(map(torch.equal, values(model), before))


@modes
def test_a_shape_that_changes_after_the_first_step_is_refused_before_anything_is_changed(options):
    model, optimizer = trained(**options)
    model[1].weight.data, model[1].bias.data = torch.ones(4, 5), torch.ones(4)
    before = values(model)
    with pytest.raises(ValueError, match=r"'1.weight' is of shape \(4, 5\) .* state of shape \(2, 5\)"):
        take_step(optimizer, losses(model))
    assert all(map(torch.equal, values(model), before))


@pytest.mark.parametrize("narrow", [False, True])
def test_what_changes_before_the_first_step_is_of_no_account(narrow):
    """The state that was made ahead has counted nothing yet."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, bias=False))
    ahead = MTAdam(model.named_parameters(), terms=("sq", "ab"))
    if narrow:
        for parameter, data in zip(model.parameters(), (X[:2], X[0, :2], X[1:3, :2]), strict=True):
            parameter.data = data.clone()
    else:
        model.double()
    other = copy.deepcopy(model)
    after = MTAdam(other.named_parameters(), terms=("sq", "ab"))
    for _ in range(2):
        take_step(ahead, losses(model))
        take_step(after, losses(other))
    assert all(map(torch.equal, values(model), values(other)))
    assert_same_snapshot(snapshot(ahead), snapshot(after))
