"""``set_importance``, of every balancer that has it: what it multiplies, from when on, what is kept and refused."""

import pytest
import torch

from lightning_mtadam.balancers import (
    FixedWeights,
    GradNorm,
    MetaBalance,
    OutputBalancer,
    ScalarizerBalancer,
    SharedLayerBalancer,
    TorchJDBalancer,
    UncertaintyWeighting,
)
from tests.balancers.cases import CASES, Balanced, balanced_by_hand, fit_from
from tests.balancers.gradients import assert_close
from tests.lightning_models import QUIET, assert_same, fit, make_loader, needs_exact_resume

pytestmark = QUIET
WEIGH = {name: case for name, case in CASES.items() if hasattr(case.make(), "set_importance")}
every_case = pytest.mark.parametrize("case", WEIGH.values(), ids=WEIGH)
LAST = next(iter(make_loader(seed=4)))


def test_balancers_that_weigh_terms_have_it_and_the_others_lack_it():
    weigh = (FixedWeights, MetaBalance, OutputBalancer, ScalarizerBalancer, SharedLayerBalancer)
    assert all(hasattr(kind, "set_importance") for kind in weigh)
    assert not any(hasattr(kind, "set_importance") for kind in (GradNorm, TorchJDBalancer, UncertaintyWeighting))


def trained(case, **importance):
    """A module after some steps, whose importances are then changed."""
    module = balanced_by_hand(case, make_loader())
    module.balancer.set_importance(importance)
    return module


def gradients(module):
    """What the next batch leaves at the network's parameters; the step is not taken."""
    optimizer = module.configure_optimizers()
    optimizer.zero_grad()
    module.balancer.attach(module)
    module.balancer.backward(module.case.losses(module.network, LAST), optimizer, model=module)
    return [parameter.grad for parameter in module.network.parameters()]


@every_case
def test_it_multiplies_what_a_term_adds_to_the_gradient_of_the_next_batch(case):
    none, half, whole = (gradients(trained(case, size=size)) for size in (0.0, 0.5, 1.0))
    if not case.make().importance:  # which what is set takes the place of
        assert_close(whole, gradients(trained(case)), 0)
    if isinstance(case.make(), OutputBalancer):  # whose shares sum to one: the others grow as this one shrinks
        shares = case.make().weights or dict.fromkeys(("fit", "size", "bend"), 1.0)
        total = {size: sum(shares.values()) - (1 - size) * shares["size"] for size in (0.0, 0.5, 1.0)}
        none, half, whole = (
            [total[size] * gradient for gradient in found]
            for size, found in zip((0.0, 0.5, 1.0), (none, half, whole), strict=True)
        )
    assert_close(half, [(one + two) / 2 for one, two in zip(none, whole, strict=True)], 1e-9)
    assert not torch.allclose(none[0], whole[0])


@every_case
def test_what_is_remembered_of_a_term_goes_on_without_its_influence(case):
    with_it, without = trained(case), trained(case, size=0.0)
    for module in (with_it, without):
        gradients(module)
    one, two = (module.balancer.state_dict()["state"] for module in (with_it, without))
    assert all(torch.equal(one[key], two[key]) for key in one.keys() - {"weights"})


@every_case
def test_weights_are_shown_with_it(case):
    module = trained(case, size=0.0, fit=0.3)
    found, weights = gradients(module), module.balancer.term_weights()
    if not weights:
        return  # a weight for each layer
    assert float(weights["size"]) == 0
    module.zero_grad()
    losses = case.losses(module.network, LAST)
    torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
    assert_close(found, [parameter.grad for parameter in module.network.parameters()], 1e-7)


@needs_exact_resume
@every_case
def test_changes_are_resumed_bitwise(case, tmp_path):
    whole = Balanced(case)
    whole.balancer.set_importance({"size": 0.3})
    fit(whole, make_loader(), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Balanced(case)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["lightning_mtadam_balancer"]["importance"] == {"size": 0.3}
    fit_from(resumed, tmp_path / "half.ckpt", max_epochs=2)
    again = Balanced(case)
    again.balancer.set_importance({"size": 0.3})
    fit(again, make_loader(), max_epochs=2)
    assert_same(resumed, again)


WRONG = {
    "unknown": ({"fit": 2.0, "sise": 1.0}, ValueError, "Did you mean 'size'"),
    "negative": ({"fit": 2.0, "size": -0.1}, ValueError, r"importance\['size'\] must be a finite number of at least 0"),
    "nan": ({"fit": 2.0, "size": float("nan")}, ValueError, "but got nan"),
    "infinite": ({"fit": 2.0, "size": float("inf")}, ValueError, "but got inf"),
    "text": (
        {"fit": 2.0, "size": "1"},
        ValueError,
        "must be a finite number of at least 0, but got '1'",
    ),
    "truth": ({"fit": 2.0, "size": True}, ValueError, "but got True"),
    "vector": ({"fit": 2.0, "size": torch.ones(2)}, ValueError, "must be a finite number"),
    "no mapping": (0.1, TypeError, "must be a mapping of terms' names to numbers, but is a float"),
    "no name": ({"fit": 2.0, 3: 1.0}, TypeError, "must be a non-empty string, but got 3"),
}


@every_case
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_raises_and_changes_nothing(case, wrong):
    importance, error, message = WRONG[wrong]
    balancer = trained(case).balancer
    balancer.set_importance({"size": torch.tensor(0.5)})
    before = balancer.importance_of(balancer.terms)
    with pytest.raises(error, match=message):
        balancer.set_importance(importance)
    assert balancer.importance_of(balancer.terms) == before
    assert before[balancer.terms.index("size")] == 0.5


def test_an_unknown_name_is_found_at_the_first_losses_where_the_terms_are_not_known_before():
    case = CASES["metabalance"]
    module = Balanced(case)
    module.balancer.set_importance({"sise": 0.5})  # no terms are known that it could be compared with
    with pytest.raises(ValueError, match="importance names the term 'sise'"):
        gradients(module)


def test_a_checkpoint_whose_importance_does_not_fit_changes_nothing():
    balancer = trained(CASES["shared layer"]).balancer
    saved = balancer.state_dict()
    with pytest.raises(ValueError, match="importance names the term 'sise'"):
        balancer.load_state_dict({**saved, "importance": {"sise": 1.0}})
    balancer.load_state_dict({key: value for key, value in saved.items() if key != "importance"})


def test_an_importance_of_zero_for_all_terms_makes_a_gradient_of_zero():
    case = CASES["output"]
    module = trained(case)
    module.balancer.set_importance(dict.fromkeys(module.balancer.terms, 0.0))
    assert all(not bool(g.any()) for g in gradients(module))
