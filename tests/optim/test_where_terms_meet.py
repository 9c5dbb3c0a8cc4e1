"""One scale for many parameters is measured on those that a term and the anchor both reach; each term in its time."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_mtadam import MTAdam

RULES = {
    "balance_every": {"balance_every": 5},
    "global": {"layers": "global"},
    "module": {"layers": "module"},
    "callable": {"layers": lambda name: name.split(".")[0], "denominator": "own"},
    "low_memory": {"layers": "module", "low_memory": True},
}
ANCHORS = ("first", "c", "mean", "max")


def parameters(count=5):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(7, dtype=torch.float64)) for _ in range(count)]


def chain(ps):
    """ "a" meets "b", "b" meets "c", "a" and "c" do not meet, and "d" meets nothing."""
    return {
        "a": (ps[0] - 1).square().sum() + (3 * ps[1]).square().sum(),
        "b": 50 * (ps[1] - 2).square().sum() + ps[2].square().sum(),
        "c": 0.01 * (ps[2] + 1).square().sum() + 7 * ps[3].square().sum(),
        "d": (ps[4] - 1).square().sum(),
    }


def trained(losses, rule, steps=40, **options):
    ps = parameters()
    named = [(f"net.p{index}", p) for index, p in enumerate(ps)]
    optimizer = MTAdam(named, lr=1e-2, terms=("a", "b", "c", "d"), **{**RULES[rule], **options})
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.backward(losses(ps, step))
        optimizer.step()
    return torch.cat([p.detach() for p in ps]), optimizer


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("scaled", ["b", "c", "d"])
@pytest.mark.parametrize("anchor", ["first", "c", "mean"])  # which norm is the largest, factors may change
@pytest.mark.parametrize("rule", RULES)
def test_a_factor_on_a_loss_changes_nothing_along_chains(rule, anchor, scaled, factor):
    if rule == "low_memory" and anchor == "mean":
        pytest.skip("low_memory refuses this anchor")

    def scaled_losses(ps, step):
        return {name: (factor if name == scaled else 1) * loss for name, loss in chain(ps).items()}

    before, _ = trained(lambda ps, step: chain(ps), rule, anchor=anchor, eps=0.0)
    after, _ = trained(scaled_losses, rule, anchor=anchor, eps=0.0)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_low_memory_or_not_scales_are_measured_where_terms_meet(rule):
    ps = parameters()
    gradients = {name: torch.autograd.grad(loss, ps, allow_unused=True) for name, loss in chain(ps).items()}
    norms = {name: [0.0 if g is None else float(g.norm()) for g in found] for name, found in gradients.items()}
    _, optimizer = trained(lambda ps, step: chain(ps), rule, steps=1)
    (scales,) = optimizer.scales().values()
    b = norms["a"][1] / norms["b"][1]
    expected = [1.0, b, b * norms["b"][2] / norms["c"][2], 1.0]
    torch.testing.assert_close(scales, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    (weights,) = optimizer.balance_weights().values()
    torch.testing.assert_close(weights, 1 / scales, rtol=1e-12, atol=0)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("rule", ["balance_every", "global", "module"])
def test_parts_of_their_own_are_trained_as_by_adam(rule, anchor):
    """Each term has a parameter of its own: nothing joins them, whatever their sizes."""

    def apart(ps, step):
        names = ("a", "b", "c", "d")
        return {name: 10.0 ** (3 * i) * (ps[i] - 1).square().sum() for i, name in enumerate(names)}

    ours, _ = trained(apart, rule, anchor=anchor, eps=0.0)
    ps = parameters()
    adam = torch.optim.Adam(ps, lr=1e-2, eps=0.0)
    for step in range(40):
        adam.zero_grad()
        sum(apart(ps, step).values()).backward()
        adam.step()
    torch.testing.assert_close(ours, torch.cat([p.detach() for p in ps]), rtol=0, atol=1e-12)


def test_an_autoencoders_divergence_does_not_overwhelm_its_encoder():
    """Most of the reconstruction's gradient lives in the decoder, which the divergence never meets."""
    torch.manual_seed(0)
    data = torch.randn(256, 4) @ torch.randn(4, 12)

    def divergence(every):
        torch.manual_seed(1)
        encoder, decoder = nn.Linear(12, 8), nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 12))
        network = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        optimizer = MTAdam(network.named_parameters(), lr=3e-3, balance_every=every)
        for _ in range(400):
            mean, spread = encoder(data).chunk(2, 1)
            code = mean + torch.randn_like(mean) * (0.5 * spread).exp()
            kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1).mean()
            optimizer.zero_grad()
            optimizer.backward({"reconstruction": F.mse_loss(decoder(code), data), "kl": kl})
            optimizer.step()
        return float(kl.detach())

    assert divergence(50) > 1
    assert divergence(5) > 1


# Each term in its own time


def due_scale(optimizer):
    (scales,) = optimizer.scales().values()
    return scales


@pytest.mark.parametrize("period", [2, 4, 8, 16])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_term_that_comes_seldom_keeps_its_due_scale(period, accumulate):
    """Its gradient grows a hundredfold; with one grid of measured steps for all it would not be measured again."""
    p = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = MTAdam([p], lr=0.0, balance_every=50, terms=("often", "rare"))
    measured = []
    for step in range(1500):
        size = 1.0 + 99.0 * (step > 500)
        optimizer.zero_grad()
        for batch in range(accumulate):
            losses = {"often": p.sum()}
            if step % period == 1 and batch == accumulate - 1:
                losses["rare"] = size * p.sum()
            optimizer.backward(losses)
        optimizer.step()
        measured.append(dict(optimizer.param_groups[0]["measured"]).get("rare") == step)
    assert due_scale(optimizer)[1] == pytest.approx(accumulate / 100, rel=0.1)
    assert sum(measured[600:]) >= 900 // (50 + 2 * period) - 1


def test_a_term_that_is_late_in_its_step_and_never_comes_again_is_not_waited_for_longer_than_it_was_missed():
    p = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = MTAdam([p], lr=0.0, balance_every=10, terms=("often", "rare"))
    waits = []
    for step in range(200):
        optimizer.zero_grad()
        optimizer.backward({"often": p.sum()})
        optimizer.backward({"often": p.sum(), **({"rare": p.sum()} if step == 60 else {})})
        optimizer.step()
        waits.append(bool(optimizer.param_groups[0]["awaited"]))
    assert (waits.index(True), sum(waits)) == (60, 60)


def seldom(optimizer, ps, steps):
    for step in steps:
        optimizer.zero_grad()
        losses = chain(ps)
        if step % 8:
            del losses["c"]
        optimizer.backward(losses)
        optimizer.step()


@pytest.mark.parametrize("at", [3, 60, 100])
def test_resume_is_exact_with_terms_that_come_seldom(tmp_path, at):
    def make(ps):
        named = [(f"net.p{index}", p) for index, p in enumerate(ps)]
        return MTAdam(named, lr=1e-2, terms=("a", "b", "c", "d"), balance_every=20)

    ps = parameters()
    optimizer = make(ps)
    seldom(optimizer, ps, range(at))
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    copies = [nn.Parameter(p.detach().clone()) for p in ps]
    resumed = make(copies)
    resumed.load_state_dict(torch.load(tmp_path / "saved", weights_only=True))
    for one, own in ((optimizer, ps), (resumed, copies)):
        seldom(one, own, range(at, at + 80))
    assert all(map(torch.equal, ps, copies))


def test_a_checkpoint_from_before_begins_the_norms_anew_and_measures_at_once():
    ps = parameters()
    optimizer = MTAdam([("p", ps[0])], lr=1e-2, balance_every=20, terms=("a", "b"))

    def step(one, p):
        one.zero_grad()
        one.backward({"a": p.square().sum(), "b": 30 * (p - 1).square().sum()})
        one.step()

    for _ in range(30):
        step(optimizer, ps[0])
    old = copy.deepcopy(optimizer.state_dict())
    for state in old["state"].values():
        del state["gradient_share"]
    for group in old["param_groups"]:
        group["measured"] = ("a", "b")
        del group["awaited"]
    other = nn.Parameter(ps[0].detach().clone())
    resumed = MTAdam([("p", other)], lr=1e-2, balance_every=20, terms=("a", "b"))
    resumed.load_state_dict(old)
    step(resumed, other)
    assert dict(resumed.param_groups[0]["measured"]) == {"a": 30, "b": 30}
    assert bool((due_scale(resumed) > 0).all())
    assert bool(resumed.state[other]["exp_avg_sq"].isfinite().all())
