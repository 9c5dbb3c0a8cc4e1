"""Layers follow from the parameters' names and groups, whenever they become known."""

import pytest
import torch
from torch import nn

from lightning_mtadam.layers import LayerNames
from lightning_mtadam.optim import MTAdam
from lightning_mtadam.parameter_names import named_alike
from tests.loops import take_step

NAMES = ("net.0.weight", "net.0.bias", "net.1.weight", "scale")


def parameters(count=4):
    return [torch.ones(2, requires_grad=True) for _ in range(count)]


def group_of(members, names=None, **options):
    return {"params": members, **({} if names is None else {"param_names": list(names)}), **options}


def layers(rule, *groups):
    names = LayerNames(rule)
    for group in groups:
        names.add(group)
    return names.layers(groups)


@pytest.mark.parametrize(
    ("rule", "expected", "places"),
    [
        ("parameter", NAMES, [0, 1, 2, 3]),
        ("module", ("net.0", "net.1", "root"), [0, 0, 1, 2]),
        ("group", ("group_0",), [0, 0, 0, 0]),
        ("global", ("global",), [0, 0, 0, 0]),
        (lambda name: name[-2:], ("ht", "as", "le"), [0, 1, 0, 2]),
    ],
    ids=["parameter", "module", "group", "global", "callable"],
)
def test_a_rule_joins_the_parameters_that_it_names_alike(rule, expected, places):
    found = layers(rule, group_of(parameters(), NAMES))
    assert found.names == expected
    assert found.layer_of.tolist() == places


def test_groups_are_called_by_their_names_or_numbers():
    members = parameters(3)
    found = layers("group", group_of(members[:2], name="trunk"), group_of(members[2:]))
    assert (found.names, found.layer_of.tolist()) == (("trunk", "group_1"), [0, 0, 1])


def test_layers_are_ordered_by_their_first_parameter():
    names = ("b.weight", "a.weight", "b.bias")
    found = layers("module", group_of(parameters(3), names))
    assert (found.names, found.layer_of.tolist()) == (("b", "a"), [0, 1, 0])


def test_parameters_without_a_name_are_called_by_their_numbers():
    assert layers("parameter", group_of(parameters(2))).names == ("parameter_0", "parameter_1")


@pytest.mark.parametrize("rule", ["module", str.upper])
def test_a_rule_that_needs_names_says_so(rule):
    with pytest.raises(ValueError, match=r"needs the parameters' names. Pass model.named_parameters\(\) instead of"):
        layers(rule, group_of(parameters(2)))


@pytest.mark.parametrize("rule", ["parameter", "module", str.upper])
def test_two_parameters_of_one_name_are_refused_where_names_matter(rule):
    with pytest.raises(ValueError, match=r"Two parameters are named 'w'. Give them different names"):
        layers(rule, group_of(parameters(1), ["w"]), group_of(parameters(1), ["w"]))


@pytest.mark.parametrize("rule", ["group", "global"])
def test_two_parameters_of_one_name_are_let_be_where_names_do_not_matter(rule):
    assert len(layers(rule, group_of(parameters(1), ["w"]), group_of(parameters(1), ["w"])).layer_of) == 2


def test_a_callable_must_return_a_name():
    with pytest.raises(TypeError, match=r"must return a layer's name, but returned 3 for the parameter 'w'"):
        layers(lambda name: 3, group_of(parameters(1), ["w"]))


def test_names_may_come_later_and_change_the_layers():
    members = parameters()
    names, groups = LayerNames("parameter"), [group_of(members)]
    names.add(groups[0])
    before = names.layers(groups)
    assert names.layers(groups) is before, "they are found once"
    names.name(zip(NAMES[:2], members[:2], strict=True), members)
    assert names.layers(groups).names == (*NAMES[:2], "parameter_2", "parameter_3")
    names.name(zip(("other", *NAMES[1:]), members, strict=True), members)
    assert names.layers(groups).names == NAMES, "a name that is known stays"


def test_a_new_group_changes_the_layers():
    members = parameters(2)
    names, groups = LayerNames("parameter"), [group_of(members[:1], ["a"])]
    names.add(groups[0])
    assert names.layers(groups).names == ("a",)
    groups.append(group_of(members[1:], ["b"]))
    names.add(groups[1])
    assert names.layers(groups).names == ("a", "b")


@pytest.mark.parametrize("params", [parameters(2), parameters(1)[0], (one for one in parameters(2))])
def test_a_group_without_names_gets_numbers_where_the_others_have_names(params):
    members = named_alike({"params": params, "lr": 0.5}, known=3)
    assert [name for name, _ in members["params"]] == [f"parameter_{3 + at}" for at in range(len(members["params"]))]
    assert members["lr"] == 0.5


def test_a_group_with_names_keeps_them():
    named = [("w", torch.ones(1))]
    assert named_alike({"params": named}, known=3)["params"] == named


def test_a_compiled_and_wrapped_networks_layers_are_those_of_the_bare_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    wrapped = [(f"module._orig_mod.{name}", parameter) for name, parameter in model.named_parameters()]
    for named in (wrapped, list(model.named_parameters())):
        optimizer = MTAdam(named, layers="module")
        take_step(optimizer, {"fit": model(torch.ones(1, 2)).square().mean()})
        assert list(optimizer.balance_weights()) == ["0", "1"]
