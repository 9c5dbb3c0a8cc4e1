"""UncertaintyWeighting against autograd of the formula as it is written, its fixed point, and what it asks for."""

import pytest
import torch
from torch import nn

from lightning_mtadam.balancers import UncertaintyWeighting
from tests.balancers.cases import CASES, Balanced, Case, balanced_by_hand
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import fit_rank, joined_rounds, rounds
from tests.lightning_models import LR, QUIET, fit, half_precision, make_loader, make_network, three_losses

pytestmark = QUIET
TERMS = ("fit", "size", "decay")


def written_out(batches, absent=()):
    """The network and the log variances after training on the formula, by autograd."""
    network, s = make_network(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([*network.parameters(), s], lr=LR)
    for batch in batches:
        losses = three_losses(network, batch)
        terms = [0.5 * (torch.exp(-s[i]) * losses[name] + s[i]) for i, name in enumerate(TERMS) if name not in absent]
        optimizer.zero_grad()
        torch.stack(terms).sum().backward()
        optimizer.step()
    return network, s.detach()


def test_network_and_log_variances_equal_autograd_of_the_formula():
    module = balanced_by_hand(CASES["uncertainty"], make_loader(20))
    network, s = written_out(make_loader(20))
    assert torch.allclose(module.balancer.learned.log_variances, s, rtol=0, atol=1e-12)
    for ours, expected in zip(module.network.parameters(), network.parameters(), strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-12)


def test_an_absent_term_has_no_part():
    module = Balanced(CASES["uncertainty, terms given"])
    balancer, optimizer = module.balancer, module.configure_optimizers()
    for batch in make_loader():
        losses = three_losses(module.network, batch)
        del losses["size"]
        optimizer.zero_grad()
        balancer.backward(losses, optimizer, model=module)
        optimizer.step()
    network, s = written_out(make_loader(), absent=("size",))
    assert s[1] == 0
    assert torch.allclose(balancer.learned.log_variances, s, rtol=0, atol=1e-12)
    assert torch.allclose(module.network[0].weight, network[0].weight, rtol=0, atol=1e-12)


def test_constant_losses_have_their_logarithms_as_fixed_point():
    network = nn.Linear(1, 1, bias=False)
    balancer = UncertaintyWeighting(("small", "large"))
    optimizer = torch.optim.SGD(balancer.learned.parameters(), lr=0.5)
    values = {"small": 0.03, "large": 200.0}
    for _ in range(300):
        optimizer.zero_grad()
        constants = {name: value + 0 * network.weight.sum() for name, value in values.items()}
        balancer.backward(constants, optimizer, model=network)
        optimizer.step()
    expected = torch.tensor(list(values.values()))
    assert torch.allclose(balancer.learned.log_variances, expected.log(), atol=1e-4)
    assert torch.allclose(torch.stack(list(balancer.term_weights().values())), 0.5 / expected, rtol=1e-4)


def rank_of(rank, strategy, accumulate):
    module = Balanced(CASES["uncertainty"])
    fit_rank(module, rank, rounds(2, 8, torch.float64), strategy=strategy, accumulate_grad_batches=accumulate)
    return [parameter.detach() for parameter in module.parameters()]


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
@pytest.mark.parametrize(
    ("strategy", "accumulate"), [({"find_unused_parameters": True}, 1), ({"static_graph": True}, 1), ({}, 2)], ids=str
)
def test_every_kind_of_ddp_equals_one_process(strategy, accumulate, tmp_path):
    """DDP does not know of the log variances, whose gradient comes from no graph."""
    alone = balanced_by_hand(
        CASES["uncertainty"], joined_rounds(2, 8, torch.float64), accumulate=accumulate
    ).parameters()
    first, second = results(run_ranks(rank_of, tmp_path, strategy, accumulate))
    for one, two, expected in zip(first, second, alone, strict=True):
        assert torch.equal(one, two)
        assert torch.allclose(one, expected, rtol=0, atol=1e-10)


def test_a_gradient_scaler_sees_scaled_gradients_of_the_log_variances():
    scaled, plain = (Balanced(Case(lambda: UncertaintyWeighting(TERMS)), torch.float32) for _ in range(2))
    for module, options in ((scaled, {"plugins": half_precision(64.0)}), (plain, {})):
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=1e-3)
        fit(module, make_loader(dtype=torch.float32), **options)
    ours, expected = (module.balancer.learned.log_variances for module in (scaled, plain))
    assert expected[1] > 0.1
    assert torch.allclose(ours, expected, rtol=0.02)


def test_an_optimizer_without_the_log_variances_is_refused():
    module = Balanced(CASES["uncertainty"])
    module.configure_optimizers = lambda: torch.optim.Adam(module.network.parameters())
    with pytest.raises(ValueError, match=r"does not hold the log variances .* all of self\.parameters\(\)"):
        fit(module, make_loader())
