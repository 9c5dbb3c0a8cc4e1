"""Names of losses and parameters, and what is refused with a message that says what to do."""

from pathlib import Path

import pytest
import torch

from lightning_mtadam import MTAdam, NonFiniteError, terms
from lightning_mtadam.balancers import (
    FixedWeights,
    GradNorm,
    MetaBalance,
    ScalarizerBalancer,
    SharedLayerBalancer,
    UncertaintyWeighting,
)

W = torch.ones(3, requires_grad=True)


def good():
    return {"fit": W.square().mean(), "size": W.abs().sum()}


BAD = {
    "no mapping": (lambda: [W.sum()], TypeError, "losses must be a mapping of names to scalar tensors, but is a list"),
    "empty": (lambda: {}, ValueError, r"losses is empty. Give at least one named loss"),
    "number": (lambda: {"fit": 1.0}, TypeError, r"losses\['fit'\].*is a float. Do not call .item\(\)"),
    "list": (lambda: {"fit": [W.sum()]}, TypeError, r"losses\['fit'\].*is a list of 1. Give each of its losses a name"),
    "none": (lambda: {"fit": None}, TypeError, r"losses\['fit'\] must be a scalar tensor, but is None. Where a batch"),
    "nested": (
        lambda: {"gan": {"g": W.sum(), "d": W.sum()}},
        TypeError,
        r"losses\['gan'\].*is a dict of \('g', 'd'\).*\{'gan_g': ..., 'gan_d': ...\}",
    ),
    "string": (lambda: {"fit": "low"}, TypeError, "is a str. Leave it out of the losses."),
    "integer": (lambda: {"fit": torch.tensor(1)}, TypeError, r"losses\['fit'\].*dtype torch.int64"),
    "boolean": (lambda: {"fit": torch.tensor(True)}, TypeError, "dtype torch.bool"),
    "complex": (lambda: {"fit": W.sum() * 1j}, TypeError, "dtype torch.complex64"),
    "vector": (lambda: {"fit": W * 1}, ValueError, r"losses\['fit'\].*shape \(3,\). Reduce it, e.g. with .mean\(\)"),
    "one element": (lambda: {"fit": W.sum()[None]}, ValueError, r"shape \(1,\)"),
    "detached": (lambda: {"fit": W.sum().detach()}, ValueError, r"losses\['fit'\] has no graph"),
    "nan": (lambda: {"fit": W.sum() * torch.nan}, NonFiniteError, r"losses\['fit'\] is nan. Nothing was changed"),
    "inf": (lambda: {"fit": W.sum() * torch.inf}, NonFiniteError, r"losses\['fit'\] is inf"),
    "the second": (lambda: {**good(), "last": W.sum() * -torch.inf}, NonFiniteError, r"losses\['last'\] is -inf"),
    "no string": (lambda: {1: W.sum()}, TypeError, "must be a non-empty string, but got 1"),
    "no name": (lambda: {"": W.sum()}, TypeError, "must be a non-empty string, but got ''"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_losses_are_refused_by_name(case):
    losses, error, message = BAD[case]
    with pytest.raises(error, match=message):
        terms.check_losses(losses())


def test_good_losses_are_let_through_whatever_their_dtypes():
    terms.check_losses(good())
    terms.check_losses({"half": W.half().sum(), "double": W.double().sum()}, ("half", "double", "absent"))


def test_what_the_caller_allows_is_let_through():
    terms.check_losses({"fit": W.sum() * torch.nan}, finite=False)
    terms.check_losses({"fit": torch.tensor(0.0)}, graph=False)
    for constant in (torch.nan, 1e-30, -2.0):  # only a zero is absent
        with pytest.raises(ValueError, match=r"losses\['fit'\] has no graph"):
            terms.check_losses({"fit": torch.tensor(constant), "size": W.sum()}, finite=False, graph=False)


@pytest.mark.parametrize(("name", "hint"), [("fitt", " Did you mean 'fit'"), ("zzz", "")])
def test_an_unknown_name_is_refused_with_the_known_ones_and_a_hint_where_one_is_near(name, hint):
    with pytest.raises(ValueError, match=rf"'{name}', but the terms are \('fit', 'size'\)\.{hint}") as caught:
        terms.check_losses({name: W.sum()}, ("fit", "size"))
    assert ("Did you mean" in str(caught.value)) is bool(hint)
    assert "must be named ahead: MTAdam(..., terms=(...))" in str(caught.value)
    assert ("here terms=('fit', 'size', 'zzz')" in str(caught.value)) is not bool(hint)


def test_what_is_no_loss_is_told_before_that_its_name_is_not_known():
    with pytest.raises(TypeError, match=r"losses\['acc'\].*is a float"):
        terms.check_losses({**good(), "acc": 0.5}, ("fit", "size"))


def test_a_non_finite_loss_is_a_value_error_and_a_floating_point_error():
    assert issubclass(NonFiniteError, ValueError)
    assert issubclass(NonFiniteError, FloatingPointError)


def test_terms_come_back_as_a_tuple():
    assert terms.check_terms(["b", "a"]) == ("b", "a")
    assert terms.check_terms(name for name in "xy") == ("x", "y")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("fit", TypeError, r"got the string 'fit'. Write \('fit',\)"),
        ((), ValueError, "terms is empty"),
        (("a", "b", "a"), ValueError, r"different from each other, but got \('a', 'b', 'a'\)"),
        (("a", ""), TypeError, "non-empty string, but got ''"),
        (("a", None), TypeError, "non-empty string, but got None"),
    ],
    ids=["string", "empty", "twice", "no name", "no string"],
)
def test_terms_must_be_a_sequence_of_different_names(given, error, message):
    with pytest.raises(error, match=message):
        terms.check_terms(given)


@pytest.mark.parametrize("anchor", ["first", "mean", "max", "unit", None, "a", "b"])
def test_an_anchor_is_a_policy_or_none_or_a_term(anchor):
    terms.check_anchor(anchor, ("a", "b"))


@pytest.mark.parametrize(
    ("anchor", "names", "message"),
    [
        ("c", ("a", "b"), r"anchor must be one of \(.*\), None or one of the terms \('a', 'b'\), but got 'c'"),
        *[(policy, ("a", policy), f"anchor={policy!r} is a policy and a term") for policy in ("mean", "max", "unit")],
    ],
)
def test_another_anchor_is_refused(anchor, names, message):
    with pytest.raises(ValueError, match=message):
        terms.check_anchor(anchor, names)


def test_a_term_that_reaches_nothing_is_refused_by_name():
    terms.check_reached("fit", [None, W.detach()])
    with pytest.raises(ValueError, match=r"losses\['fit'\] reaches no parameter"):
        terms.check_reached("fit", [None, None])


def test_the_first_norm_that_is_not_finite_is_named_with_what_is_left():
    norms = torch.tensor([[1.0, 2.0], [3.0, torch.inf], [torch.nan, 1.0]])
    error = terms.non_finite(norms, ("one", "two", "three"), ("fit", "size"), "All is as it was.")
    assert isinstance(error, NonFiniteError)
    message = "term 'size' at the layer 'two' is not finite: its norm is inf in torch.float32. All is as it was."
    assert message in str(error)
    assert "Nothing was changed." in str(terms.non_finite(norms, ("one", "two", "three"), ("fit", "size")))


@pytest.mark.parametrize(
    ("names", "clean"),
    [
        (["0.weight", "0.bias"], ["0.weight", "0.bias"]),
        (["_orig_mod.0.weight", "_orig_mod.0.bias"], ["0.weight", "0.bias"]),
        (["net._orig_mod.weight"], ["net.weight"]),
        (["module.0.weight", "module.0.bias"], ["0.weight", "0.bias"]),
        (["module._orig_mod.0.weight"], ["0.weight"]),
        (["_orig_mod.module.0.weight"], ["0.weight"]),
        (["module.module.0.weight"], ["module.0.weight"]),
        (["module.weight", "head.weight"], ["module.weight", "head.weight"]),
        (["module.weight", "parameter_1"], ["weight", "parameter_1"]),
        ([], []),
    ],
)
def test_names_are_those_of_the_bare_network(names, clean):
    assert terms.clean_names(names) == clean


@pytest.mark.parametrize(
    "balances",
    [
        MTAdam([W]),
        FixedWeights({"fit": 1.0}),
        MetaBalance(),
        UncertaintyWeighting(terms=("fit", "size")),
        GradNorm("0"),
        SharedLayerBalancer("0"),
        ScalarizerBalancer(torch.sum),
    ],
    ids=lambda one: type(one).__name__,
)
def test_the_optimizer_and_the_balancers_answer_alike_before_anything_was_seen(balances):
    assert isinstance(balances, terms.BalancesTerms)
    assert isinstance(balances.terms, tuple)
    balances.name_parameters([("w", W)])
    for read in ("gradient_norms", "balance_weights", "scales", "term_weights", "average_weights"):
        assert isinstance(getattr(balances, read)(), dict)


def test_what_balances_nothing_is_none_of_them():
    assert not isinstance(torch.optim.Adam([W]), terms.BalancesTerms)


def test_a_warning_points_at_the_users_line_even_in_a_folder_that_begins_like_the_packages():
    user = str(Path(terms.__file__).parent) + "_examples/train.py"
    with pytest.warns(UserWarning, match="look here") as caught:
        exec(compile("\n\nterms.warn('look here')", user, "exec"), {"terms": terms})
    assert (caught[0].filename, caught[0].lineno) == (user, 3)


def test_tensors_are_on_the_host_if_all_are():
    assert terms.are_on_host([torch.zeros(1), torch.zeros(1)])
    assert not terms.are_on_host([torch.zeros(1), torch.zeros(1, device="meta")])
