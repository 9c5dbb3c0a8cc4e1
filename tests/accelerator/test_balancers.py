"""Every balancer gives the host's numbers on the accelerator, and the host waits for none but TorchJD's aggregators."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_mtadam import NonFiniteError
from lightning_mtadam.balancers import TorchJDBalancer
from tests.accelerator.device import KINDS, Watch
from tests.accelerator.training import DEVICE
from tests.balancers.cases import CASES, Balanced
from tests.lightning_models import make_loader
from tests.loops import clip_by_hand

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
WAITS = ("item", "d2h", "h2d", "kernel")


class Loop:
    """The plain loop, a step at a time."""

    def __init__(self, case, device):
        self.case, self.device, self.module = case, device, Balanced(case)
        self.balancer = self.module.balancer  # made before the module moves, as by the trainer
        self.module.to(device)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3)  # without a state, which would wait
        self.balancer.attach(self.module)

    def step(self, batch, *, within=(), accumulate=1, clip=None, scale=None):
        self.optimizer.zero_grad()
        for _ in range(accumulate):
            share = torch.full((), 1 / accumulate, dtype=torch.float64, device=self.device)
            losses = self.case.losses(self.module.network, batch)
            if scale is not None:
                share = share * scale
            with Watch(*within) if within else nullcontext() as watch:
                self.balancer.backward(losses, self.optimizer, model=self.module, grad_output=share, loss_scale=scale)
        if scale is not None:
            for parameter in self.module.parameters():
                parameter.grad = parameter.grad / scale if parameter.grad is not None else None
        if clip is not None:
            clip_by_hand(self.optimizer, *clip)
        self.optimizer.step()
        return watch


def batches(device, count=8):
    return [(x.to(device), y.to(device)) for x, y in make_loader(count)]


def assert_same(mine, theirs):
    pairs = zip(mine.module.parameters(), theirs.module.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.detach().cpu(), other.detach().cpu(), rtol=1e-10, atol=1e-12)
    state, expected = mine.balancer.state_dict()["state"], theirs.balancer.state_dict()["state"]
    assert state.keys() == expected.keys()
    for key, value in state.items():
        torch.testing.assert_close(value.cpu(), expected[key].cpu(), rtol=1e-10, atol=1e-12)
    for read in ("term_weights", "balance_weights", "average_weights"):
        found, wanted = getattr(mine.balancer, read)(), getattr(theirs.balancer, read)()
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            torch.testing.assert_close(value.cpu(), wanted[name].cpu(), rtol=1e-10, atol=1e-12, equal_nan=True)


@every_case
@pytest.mark.parametrize("mode", [{}, {"accumulate": 2}, {"clip": (0.05, "norm")}], ids=str)
def test_it_gives_the_numbers_of_the_host(case, mode):
    here, there = Loop(case, "cpu"), Loop(case, DEVICE)
    for mine, theirs in zip(batches("cpu"), batches(DEVICE), strict=True):
        here.step(mine, **mode)
        there.step(theirs, **mode)
    assert_same(there, here)


@every_case
def test_it_gives_the_numbers_of_the_host_with_a_loss_scale(case):
    here, there = Loop(case, "cpu"), Loop(case, DEVICE)
    for mine, theirs in zip(batches("cpu"), batches(DEVICE), strict=True):
        for loop, batch in ((here, mine), (there, theirs)):
            loop.step(batch, scale=torch.full((), 64.0, dtype=torch.float64, device=loop.device))
    assert_same(there, here)


@every_case
@pytest.mark.parametrize(("written", "read"), [("cpu", DEVICE), (DEVICE, "cpu")])
def test_a_state_of_one_device_continues_on_the_other(case, written, read):
    expected, first = Loop(case, "cpu"), Loop(case, written)
    for index, (batch, same) in enumerate(zip(batches("cpu"), batches(written), strict=True)):
        expected.step(batch)
        if index < 4:
            first.step(same)
    continued = Loop(case, read)
    continued.module.load_state_dict(copy.deepcopy(first.module.state_dict()))
    continued.balancer.load_state_dict(copy.deepcopy(first.balancer.state_dict()))
    for batch in batches(read)[4:]:
        continued.step(batch)
    assert_same(continued, expected)


QUIET = {name: case for name, case in CASES.items() if "torchjd" not in name}


@pytest.mark.stand_in
@pytest.mark.parametrize("case", QUIET.values(), ids=QUIET)
def test_the_host_does_not_wait(case):
    loop = Loop(case, DEVICE)
    for batch in batches(DEVICE, 6):
        loop.step(batch)
    for batch in batches(DEVICE, 2):
        watch = loop.step(batch, within=KINDS)
        assert not watch.waits


class Mean(nn.Module):
    """An aggregator that makes no one wait."""

    def forward(self, matrix):
        return matrix.mean(0)


@pytest.mark.stand_in
def test_the_host_waits_for_an_aggregator_only():
    case = CASES["metabalance"]
    loop = Loop(case, DEVICE)
    loop.balancer = TorchJDBalancer(Mean())
    for batch in batches(DEVICE, 4):
        loop.step(batch)
    watch = loop.step(batches(DEVICE)[0], within=WAITS)
    assert sum(watch.waits.values()) <= 1  # the event of the step before


@pytest.mark.parametrize("scaled", [False, True])
def test_a_matrix_that_is_not_finite_is_told_of_a_step_later(scaled):
    loop = Loop(CASES["metabalance"], DEVICE)
    loop.balancer = TorchJDBalancer(Mean())
    data, scale = batches(DEVICE), torch.full((), 8.0, dtype=torch.float64, device=DEVICE) if scaled else None
    for batch in data[:3]:
        loop.step(batch, scale=scale)
    x, y = data[3]
    before = [parameter.detach().cpu() for parameter in loop.module.parameters()]
    loop.optimizer.zero_grad()
    losses = loop.case.losses(loop.module.network, (x * torch.inf, y)) if scaled else None
    if losses is None:
        weight = loop.module.network[0].weight
        losses = {**loop.case.losses(loop.module.network, (x, y)), "decay": (weight * torch.inf).sum()}
    loop.balancer.backward(losses, loop.optimizer, model=loop.module, grad_output=scale, loss_scale=scale)
    gradients = [parameter.grad.cpu() for parameter in loop.module.parameters()]
    if scaled:  # its scaler sees it, and skips the step
        assert any(not bool(gradient.isfinite().all()) for gradient in gradients)
        loop.optimizer.zero_grad()
        loop.step(data[4], scale=scale)
        return
    assert not any(bool(gradient.any()) for gradient in gradients)
    loop.optimizer.step()
    for parameter, value in zip(loop.module.parameters(), before, strict=True):
        assert torch.equal(parameter.detach().cpu(), value)
    with pytest.raises(NonFiniteError, match="decay"):
        loop.step(data[4])
    loop.step(data[4])  # it is told once
