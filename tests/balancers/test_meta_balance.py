import pytest
import torch

from lightning_mtadam.balancers import MetaBalance
from tests.balancers.gradients import TERMS, TwoHeads, assert_close, gradients_of, last_gradients, shown
from tests.lightning_models import make_loader, make_mtadam, make_network, sgd, three_losses
from tests.optim.test_noise import BeforeNorm, inputs
from tests.oracles.naive_meta_balance import NaiveMetaBalance

BATCHES = list(make_loader(9))


@pytest.mark.parametrize("anchor", ["first", "size", "mean", "max"])
@pytest.mark.parametrize("relax", [0.7, 1.0])
def test_it_equals_the_naive_loop(anchor, relax):
    """Over terms that reach some layers only, and terms that are absent in some steps."""
    network = make_network()
    balancer, optimizer = MetaBalance(relax, 0.8, anchor, terms=TERMS), sgd(network)
    naive = NaiveMetaBalance(TERMS, relax=relax, beta=0.8, anchor=anchor)
    for step, batch in enumerate(BATCHES):
        losses = three_losses(network, batch)
        if step % 3 == 1:
            del losses["size" if step > 5 else "decay"]
        expected = naive.combine(gradients_of(losses, network))
        assert_close(shown(balancer, losses, network), expected, 1e-12)
        optimizer.step()
    for p, weights in enumerate(balancer.balance_weights().values()):
        ratios = [naive.n.get((term, p), torch.nan) / naive.magnitude(p) for term in TERMS]
        assert torch.allclose(weights, torch.tensor(ratios, dtype=torch.float64), rtol=1e-12, equal_nan=True)


@pytest.mark.parametrize("anchor", ["first", "mean"])
def test_fully_balanced_it_has_the_scales_of_mtadam(anchor):
    network, twin = make_network(), make_network()
    balancer, optimizer = MetaBalance(relax=1, beta=0.9, anchor=anchor), sgd(network)
    mtadam = make_mtadam(twin, betas=(0.9, 0.999, 0.9), anchor=anchor)
    for batch in BATCHES:
        twin.load_state_dict(network.state_dict())
        mtadam.zero_grad()
        mtadam.backward(three_losses(twin, batch))
        gradients = gradients_of(three_losses(network, batch), network)
        mtadam.step()
        scales = mtadam.scales().values()
        expected = [
            sum(scale * gradient for scale, gradient in zip(row, column, strict=True) if gradient is not None)
            for row, column in zip(scales, zip(*gradients.values(), strict=True), strict=True)
        ]
        assert_close(shown(balancer, three_losses(network, batch), network), expected, 1e-13)
        optimizer.step()
    assert balancer.balance_weights().keys() == mtadam.balance_weights().keys()
    for layer, weights in mtadam.balance_weights().items():
        assert torch.allclose(balancer.balance_weights()[layer], weights, rtol=1e-13, equal_nan=True)


def test_not_balanced_at_all_it_is_the_plain_sum():
    network = make_network()
    found = shown(MetaBalance(relax=0), three_losses(network, BATCHES[0]), network)
    network.zero_grad()
    sum(three_losses(network, BATCHES[0]).values()).backward()
    assert_close(found, [parameter.grad for parameter in network.parameters()], 1e-12)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_fully_balanced_a_factor_on_another_loss_than_the_anchor_changes_nothing(factor):
    plain, multiplied = (last_gradients(MetaBalance(relax=1), BATCHES, size=size) for size in (1, factor))
    assert_close(plain, multiplied, 1e-9)


def test_a_head_private_to_one_term_gets_that_terms_gradient():
    model = TwoHeads()
    losses = model.losses(BATCHES[0][0])
    expected = gradients_of(losses, model)["second"][-2:]
    assert_close(shown(MetaBalance(), losses, model)[-2:], expected, 1e-14)


def test_norms_stay_with_their_layers_when_parameters_are_added():
    """As a fine-tuning callback does."""
    model = TwoHeads()
    balancer, optimizer = MetaBalance(), torch.optim.SGD(model.trunk[0].parameters(), lr=1e-3)
    balancer.backward(model.losses(BATCHES[0][0]), optimizer, model=model)
    before = balancer.balance_weights()
    optimizer.param_groups[0]["params"].insert(0, model.first.weight)
    optimizer.zero_grad()
    balancer.backward(model.losses(BATCHES[0][0]), optimizer, model=model)
    after = balancer.balance_weights()
    assert set(before) == {"trunk.0.weight", "trunk.0.bias"}
    assert set(after) == {*before, "first.weight"}
    assert all(torch.allclose(after[layer], before[layer]) for layer in before)
    assert after["first.weight"][0] == 1
    assert after["first.weight"][1].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("anchor", ["first", "distance", "mean", "max"])
@pytest.mark.parametrize("terms", [("entropy", "distance"), None])
def test_rounding_noise_is_left_out_of_anchor_and_balance(terms, anchor, dtype):
    """The bias before a batch normalisation: as the same function without the bias there."""
    trained = []
    for bias in (True, False):
        model = BeforeNorm(bias=bias).to(dtype)
        balancer, optimizer = (
            MetaBalance(1.0, anchor=anchor, terms=terms),
            torch.optim.Adam(model.parameters(), lr=1e-2),
        )
        for x in inputs(40, dtype):
            optimizer.zero_grad()
            balancer.backward(model.losses(x), optimizer, model=model)
            optimizer.step()
        trained.append(model)
        assert balancer.balance_weights()["lin.bias"].isnan().tolist() == [True, False]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for ours, theirs in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("relax", [0.0, 0.7])
def test_noise_is_added_as_it_is_times_one_minus_relax(relax):
    """And equals the naive loop."""
    w, v = (torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    model = torch.nn.ParameterList([w, v])
    losses = {"a": 1e-16 * w[0] + v[0], "b": w[1] + v[1]}
    gradients = gradients_of(losses, model)
    balancer, naive = MetaBalance(relax, anchor="b", terms=("a", "b")), NaiveMetaBalance("ab", relax=relax, anchor="b")
    found = shown(balancer, {"a": 1e-16 * w[0] + v[0], "b": w[1] + v[1]}, model)
    assert found[0].tolist() == pytest.approx([1e-16 * (1 - relax), 1, 0], rel=1e-12)
    assert_close(found, naive.combine(gradients), 1e-12)


WRONG = {
    "relax": ({"relax": 1.1}, "relax must be from 0 to 1, but got 1.1"),
    "beta": ({"beta": 1.0}, "beta must be at least 0 and below 1, but got 1.0"),
    "unit": ({"anchor": "unit"}, "anchor must be 'first', 'mean', 'max' or a term's name, but got 'unit'"),
    "unknown": ({"anchor": "fitt", "terms": TERMS}, "anchor must be one of"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options_are_refused(wrong):
    options, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        MetaBalance(**options)


def test_an_anchor_that_is_no_term_is_refused_at_the_first_losses():
    network = make_network()
    with pytest.raises(ValueError, match="anchor must be one of"):
        shown(MetaBalance(anchor="fitt"), three_losses(network, BATCHES[0]), network)
