"""What a light step of MTAdam(balance_every=k) does and does not do, and what happens between two measurements."""

import copy
from itertools import pairwise

import pytest
import torch

from lightning_mtadam import NonFiniteError
from lightning_mtadam.optim.light import SUM, weighted_sum
from tests.lightning_models import (
    LR,
    assert_same,
    assert_same_state,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
)
from tests.loops import take_step
from tests.optim.streams import LENGTH, follow, make, start, stream
from tests.oracles.naive_balance_every import NaiveBalanceEvery, measured_steps
from tests.spoiling import spoilt

EVERY, STEPS = 5, 24
NAMES = ("fit", "size", "decay")
LIGHT = 5
"""The first light step: measured are 0, 1, 2, 3, 4, 6, 8, ..."""


def run(steps=STEPS, *, accumulate=1, clip=None, scale=None, **options):
    """Train as a user would; ``scale`` is a gradient scaler's."""
    network = make_network()
    optimizer = make_mtadam(network, balance_every=EVERY, **options)
    batches = iter(make_loader(steps * accumulate))
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            factor = torch.tensor((scale or 1.0) / accumulate, dtype=torch.float64)
            loss_scale = None if scale is None else torch.tensor(scale, dtype=torch.float64)
            optimizer.backward(three_losses(network, next(batches)), grad_output=factor, loss_scale=loss_scale)
        if clip is not None:
            optimizer.clip_gradients(clip[1], clip[0])
        optimizer.step()
    return network, optimizer


def by_hand(accumulate, clip, **options):
    """The oracle, fed with each term's gradient over all batches of a step."""
    network = make_network()
    parameters = list(network.parameters())
    oracle = NaiveBalanceEvery([p.detach().numpy() for p in parameters], NAMES, EVERY, lr=LR, **options)
    batches = iter(make_loader(STEPS * accumulate))
    for _ in range(STEPS):
        totals = dict.fromkeys(NAMES, 0)
        for _ in range(accumulate):
            for name, loss in three_losses(network, next(batches)).items():
                totals[name] = totals[name] + loss / accumulate
        gradients = {
            name: torch.autograd.grad(t, parameters, retain_graph=True, allow_unused=True) for name, t in totals.items()
        }
        oracle.step(
            {name: [None if g is None else g.numpy() for g in found] for name, found in gradients.items()}, clip
        )
        with torch.no_grad():
            for parameter, value in zip(parameters, oracle.parameters, strict=True):
                parameter.copy_(torch.as_tensor(value))
    return network


@pytest.mark.parametrize("scale", [None, 2.0**16])
@pytest.mark.parametrize("clip", [None, ("norm", 0.05), ("value", 0.01)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulation_clipping_and_loss_scaling_equal_the_loop_by_hand(accumulate, clip, scale):
    ours, _ = run(accumulate=accumulate, clip=clip, scale=scale, eps=1e-2)
    expected = by_hand(accumulate, clip, eps=1e-2)
    for p, q in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def passes_of(monkeypatch):
    """A list that grows by one for every call of ``torch.autograd.grad``."""
    calls, grad = [], torch.autograd.grad

    def counted(*args, **kwargs):
        calls.append(args)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return calls


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_light_step_takes_one_backward_pass(accumulate, monkeypatch):
    calls = passes_of(monkeypatch)
    measured = []
    network = make_network()
    optimizer = make_mtadam(network, balance_every=EVERY)
    for step in range(30):
        optimizer.zero_grad()
        for batch in make_loader(accumulate, seed=step):
            before = len(calls)
            optimizer.backward(three_losses(network, batch))
            passes = len(calls) - before
            assert passes in (1, len(NAMES))
            measured += [step] if passes == len(NAMES) else []
        optimizer.step()
    assert measured == [step for step in measured_steps(EVERY, 30) for _ in range(accumulate)]


def test_a_new_term_is_measured_in_the_step_it_comes_in(monkeypatch):
    calls = passes_of(monkeypatch)
    network = make_network()
    optimizer = make_mtadam(network, balance_every=50, terms=NAMES)
    passes = []
    for step, batch in enumerate(make_loader(30)):
        losses = three_losses(network, batch)
        if step < 25:
            del losses["size"]
        before = len(calls)
        take_step(optimizer, losses)
        passes.append(len(calls) - before)
    assert optimizer.scales()["global"].gt(0).all()
    assert passes[22:] == [1, 2, 1, 3, 1, 1, 1, 3]  # at 23 and 29 by the schedule, at 25 for the new term


def test_a_new_term_in_a_later_batch_of_an_accumulated_step_waits_for_the_next_measurement():
    scales = []
    network = make_network()
    optimizer = make_mtadam(network, balance_every=50, terms=NAMES)
    for step, (first, second) in enumerate(zip(make_loader(12), make_loader(12, seed=2), strict=True)):
        losses = three_losses(network, first)
        del losses["size"]
        optimizer.zero_grad()
        optimizer.backward(losses)
        late = three_losses(network, second)
        optimizer.backward(late if step >= 7 else {"fit": late["fit"]})
        optimizer.step()
        scales.append(float(optimizer.scales()["global"][1]))
    assert [step for step, scale in enumerate(scales) if scale > 0] == [8, 9, 10, 11]


def test_light_steps_leave_the_balance_as_it_is():
    network = make_network()
    optimizer = make_mtadam(network, balance_every=EVERY)
    seen = []
    for batch in make_loader(9):
        take_step(optimizer, three_losses(network, batch))
        seen.append([optimizer.balance_weights(), optimizer.gradient_norms(), optimizer.scales()])
    for (before, now), same in zip(pairwise(seen), [False] * 4 + [True, False, True, False], strict=True):
        for one, other in zip(before, now, strict=True):
            assert torch.equal(one["global"], other["global"]) == same


def _scales_of_the_next_step(network, optimizer, accumulate):
    optimizer.zero_grad()
    for batch in make_loader(accumulate, seed=5):
        optimizer.backward(three_losses(network, batch))
    optimizer.step()
    return optimizer.scales()["global"]


@pytest.mark.parametrize("loss_scale", [None, 8.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_shown_gradient_is_the_balanced_sum_in_full_and_in_light_steps(accumulate, loss_scale):
    for step in (LIGHT, LIGHT + 1):
        (network, optimizer), ahead = run(step), run(step)
        scales = _scales_of_the_next_step(*ahead, accumulate)
        optimizer.zero_grad()
        expected = [torch.zeros_like(p) for p in network.parameters()]
        for batch in make_loader(accumulate, seed=5):
            total = sum(s * loss for s, loss in zip(scales, three_losses(network, batch).values(), strict=True))
            for one, gradient in zip(expected, torch.autograd.grad(total, list(network.parameters())), strict=True):
                one += (loss_scale or 1.0) * gradient
            scale = None if loss_scale is None else torch.tensor(loss_scale)
            optimizer.backward(three_losses(network, batch), grad_output=scale, loss_scale=scale)
        for parameter, one in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [LIGHT, LIGHT + 1])
def test_the_read_scales_include_clipping_by_norm(steps):
    network, optimizer = run(steps)
    (batch,) = make_loader(1, seed=5)
    optimizer.zero_grad()
    optimizer.backward(three_losses(network, batch))
    optimizer.clip_gradients(0.01)
    optimizer.step()
    weights = optimizer.balance_weights()["global"]
    ratios = optimizer.scales()["global"] * weights
    torch.testing.assert_close(ratios, ratios[:1].expand(3))
    assert ratios[0] < 0.5


def test_a_step_that_is_skipped_by_the_loop_does_not_count(monkeypatch):
    calls = passes_of(monkeypatch)
    network, optimizer = run(LIGHT + 1)
    for _ in range(3):
        optimizer.skip_step()
        optimizer.step()
    before = len(calls)
    for batch in make_loader(1):
        optimizer.backward(three_losses(network, batch))
    assert len(calls) - before == len(NAMES)


def test_a_backward_pass_that_is_dropped_does_not_count(monkeypatch):
    """As when a gradient scaler leaves the step out."""
    calls = passes_of(monkeypatch)
    network, optimizer = run(LIGHT)
    for batch in make_loader(4):
        before = len(calls)
        optimizer.backward(three_losses(network, batch))
        optimizer.zero_grad()
        assert len(calls) - before == 1


@pytest.mark.parametrize("steps", [LIGHT, LIGHT + 1])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_gradient_that_is_not_finite_changes_nothing(on_nonfinite, steps):
    network, optimizer = run(steps, on_nonfinite=on_nonfinite)
    expected, same = run(steps, on_nonfinite=on_nonfinite)
    name = "sum of the terms" if steps == LIGHT else "size"
    message = f"The gradient of the term '{name}' at the layer '0.weight' is not finite"
    for index, batch in enumerate(make_loader(8, seed=5)):
        if index == 0:
            optimizer.zero_grad()
            optimizer.backward(spoilt(three_losses(network, batch), "size"))
            with (
                pytest.raises(NonFiniteError, match=message) if on_nonfinite == "raise" else pytest.warns(match=message)
            ):
                optimizer.step()
            assert_same(network, expected)
            assert_same_state(optimizer, same)
        for net, opt in ((network, optimizer), (expected, same)):
            take_step(opt, three_losses(net, batch))
    assert_same(network, expected)
    assert_same_state(optimizer, same)


def copies(parameters):
    return [p.detach().double().numpy().copy() for p in parameters]


@pytest.mark.parametrize("options", [{}, {"anchor": "mean", "amsgrad": True}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("at", [0, 1, 5, 7, 10, 22, 39])
def test_resume_continues_bitwise_also_between_two_measurements(tmp_path, at, options):
    gradients = list(stream(LENGTH, 0))
    parameters, optimizer = make(start(0), rule=None, balance_every=20, **options)
    follow(optimizer, parameters, gradients[:at])
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    values = copies(parameters)
    follow(optimizer, parameters, gradients[at:])

    resumed_parameters, resumed = make(values, rule=None, balance_every=20, **options)
    resumed.load_state_dict(torch.load(tmp_path / "saved", weights_only=True))
    follow(resumed, resumed_parameters, gradients[at:])
    assert all(torch.equal(p, q) for p, q in zip(parameters, resumed_parameters, strict=True))
    assert_same_state(optimizer, resumed)
    assert torch.equal(optimizer.scales()["global"], resumed.scales()["global"])


def test_checkpoints_from_before_steps_were_counted_are_loaded():
    parameters, optimizer = make(start(0))
    follow(optimizer, parameters, stream(10, 0))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["steps"], group["measured"], group["awaited"]
    resumed_parameters, resumed = make(copies(parameters))
    resumed.load_state_dict(saved)
    follow(optimizer, parameters, stream(10, 1))
    follow(resumed, resumed_parameters, stream(10, 1))
    assert all(torch.equal(p, q) for p, q in zip(parameters, resumed_parameters, strict=True))


@pytest.mark.parametrize("names", [("constant", "fit"), ("fit", "constant")])
def test_a_constant_in_another_dtype_does_not_narrow_the_sum(names):
    """As on one of several processes: what the sum is multiplied by would be rounded."""
    losses = {"constant": torch.zeros(()), "fit": torch.ones((), dtype=torch.float64)}
    total = weighted_sum({name: losses[name] for name in names}, dict.fromkeys(names, torch.tensor(2.0)))[SUM]
    assert (total.dtype, float(total)) == (torch.float64, 2)
