"""MTAdam(balance_every=k): the laws, and equality with an independent naive float64 implementation."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mtadam.optim import MTAdam
from lightning_mtadam.optim.state import BALANCE_KEYS
from tests.loops import train
from tests.optim.streams import LENGTH, NAMES, TERMS, follow, make, start, stream
from tests.oracles.naive_balance_every import NaiveBalanceEvery

STEPS = LENGTH
TOLERANCE = 1e-10


def compare(every, *, clip=None, seed=0, **options):
    parameters, optimizer = make(start(seed), rule=None, balance_every=every, **options)
    oracle = NaiveBalanceEvery(start(seed), TERMS, every, **options)
    kinds = [oracle.step(found, clip) for found in stream(STEPS, seed)]
    assert any(kinds)
    assert not all(kinds)
    follow(optimizer, parameters, stream(STEPS, seed), clip=clip)
    for ours, theirs, name in zip(parameters, oracle.parameters, NAMES, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=TOLERANCE, err_msg=name)
    weights = [oracle.balance_weight(term) for term in TERMS]
    np.testing.assert_allclose(optimizer.balance_weights()["global"].numpy(), weights, rtol=1e-9)
    norms = [oracle.norm(term) for term in TERMS]
    np.testing.assert_allclose(optimizer.gradient_norms()["global"].numpy(), norms, rtol=1e-9)
    if clip is None:
        scales = [oracle.scale[term] for term in TERMS]
        np.testing.assert_allclose(optimizer.scales()["global"].numpy(), scales, rtol=1e-9)


@pytest.mark.parametrize("every", [5, 50])
@pytest.mark.parametrize("anchor", ["first", "b", "c", "mean", "max", "unit", None])
def test_every_anchor_equals_the_oracle(anchor, every):
    compare(every, anchor=anchor)


@pytest.mark.parametrize("anchor", ["first", "mean", None])
@pytest.mark.parametrize(
    "options",
    [
        {"update": "mean"},
        {"importance": {"b": 0.25, "c": 2.0}},
        {"importance": {"a": 0.0}},
        {"max_scale": 0.5},
        {"weight_decay": 0.1},
        {"amsgrad": True},
        {"maximize": True},
        {"eps": 1e-3, "betas": (0.5, 0.9, 0.0)},
        {"lr": 0.05, "betas": (0.0, 0.99, 0.99)},
        {"clip": ("norm", 0.7)},
        {"clip": ("value", 0.05)},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_other_option_equals_the_oracle(options, anchor):
    compare(5, anchor=anchor, **options)


def test_with_one_nothing_is_changed():
    """Every step is the paper's, with a second moment for each term and norms that start from the first."""
    (parameters, optimizer), (expected, default) = make(start(0), balance_every=1), make(start(0))
    follow(optimizer, parameters, stream(STEPS, 0))
    follow(default, expected, stream(STEPS, 0))
    assert all(torch.equal(p, q) for p, q in zip(parameters, expected, strict=True))
    for parameter, state in optimizer.state.items():
        assert set(state) == {"exp_avg", "exp_avg_sq", *BALANCE_KEYS}
        assert state["exp_avg_sq"].shape == (len(TERMS), *parameter.shape)
    layers, norm_init, denominator = (optimizer.param_groups[0][key] for key in ("layers", "norm_init", "denominator"))
    assert (layers, norm_init, denominator) == ("parameter", "first", "max")


def test_the_state_is_adams():
    """Two moments of each element, whatever the number of terms."""
    parameters, optimizer = make(start(0), rule=None, balance_every=5)
    follow(optimizer, parameters, stream(3, 0))
    for parameter, state in optimizer.state.items():
        assert (state["exp_avg"].shape, state["exp_avg_sq"].shape) == (parameter.shape, (1, *parameter.shape))


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize(("anchor", "scaled"), [("first", "b"), ("first", "c"), ("b", "a")])
def test_a_factor_on_a_loss_other_than_the_anchor_changes_nothing(anchor, scaled, factor):
    """Also where the anchor misses the term's first measurement, and where a term comes late."""
    results = []
    for factors in ((1.0, 1.0, 1.0), tuple(factor if term == scaled else 1.0 for term in TERMS)):
        parameters, optimizer = make(start(0), rule=None, balance_every=20, anchor=anchor)
        follow(optimizer, parameters, stream(STEPS, 0, scale=factors))
        results.append(parameters)
    assert_close(*results, 1e-9)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_factor_on_any_loss_changes_nothing_with_eps_zero(factor):
    results = []
    for scale in ((1.0, 1.0, 1.0), (factor, 1.0, 1.0)):
        parameters, optimizer = make(start(0), rule=None, balance_every=20, eps=0.0)
        follow(optimizer, parameters, stream(STEPS, 0, scale=scale))
        results.append(parameters)
    assert_close(*results, 1e-9)


def assert_close(first, second, tolerance):
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("anchor", ["first", "mean", "max", None])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_one_term_equals_adam(anchor, decay, amsgrad):
    def losses(model):
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            yield {"fit": model(torch.randn(8, 3, generator=generator, dtype=torch.float64)).square().mean()}

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    ours, theirs = network(), network()
    optimizer = MTAdam(ours.named_parameters(), balance_every=20, anchor=anchor, weight_decay=decay, amsgrad=amsgrad)
    adam = torch.optim.AdamW(theirs.parameters(), weight_decay=decay, amsgrad=amsgrad)
    train(optimizer, losses(ours))
    train(adam, losses(theirs))
    assert_close(ours.parameters(), theirs.parameters(), 1e-12)


def test_identical_terms_equal_adam():
    """The sum of three equal terms is three times as long, and Adam does not see it."""

    def run(names):
        parameters = [torch.tensor(value, requires_grad=True) for value in start(0)]
        optimizer = MTAdam(parameters, balance_every=20, eps=0)
        follow(optimizer, parameters, (dict.fromkeys(names, found["a"]) for found in stream(STEPS, 0)))
        return parameters

    assert_close(run(("a", "b", "c")), run(("a",)), 1e-12)


REFUSED = {
    "zero": ({"balance_every": 0}, ValueError, "balance_every must be at least 1, but got 0"),
    "negative": ({"balance_every": -3}, ValueError, "balance_every must be at least 1, but got -3"),
    "fraction": ({"balance_every": 2.5}, TypeError, r"balance_every must be a whole number, but got 2\.5"),
    "infinite": ({"balance_every": math.inf}, TypeError, "balance_every must be a whole number, but got inf"),
    "text": ({"balance_every": "5"}, TypeError, "balance_every must be a whole number, but got '5'"),
    "layers": ({"balance_every": 5, "layers": "parameter"}, ValueError, "Leave out layers.*got 'parameter' and 'sum'"),
    "own layers": ({"balance_every": 5, "layers": str.upper}, ValueError, "one weight for the whole network"),
    "denominator": ({"balance_every": 5, "denominator": "max"}, ValueError, "got 'global' and 'max'"),
    "low_memory": ({"balance_every": 5, "low_memory": True}, ValueError, "balance_every=5 needs those of all terms"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        MTAdam([nn.Parameter(torch.ones(2))], **options)


def test_it_holds_for_the_whole_optimizer():
    with pytest.raises(ValueError, match="balance_every holds for the whole optimizer"):
        MTAdam([{"params": [nn.Parameter(torch.ones(2))], "balance_every": 2}], balance_every=5)


@pytest.mark.parametrize("given", [{"layers": "global"}, {"denominator": "sum"}])
def test_what_it_is_anyway_may_be_said(given):
    MTAdam([nn.Parameter(torch.ones(2))], balance_every=5, **given)


def test_a_term_cannot_be_called_as_the_sum_is():
    with pytest.raises(ValueError, match=r"No term can be called 'sum of the terms'"):
        MTAdam([torch.nn.Parameter(torch.zeros(1))], terms=("sum of the terms",))
