"""Two ranks on accelerators equal one process, whether the averages arrive early or late."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mtadam import MTAdam
from tests.accelerator.device import Watch
from tests.accelerator.late_group import late_all_reduces
from tests.balancers.cases import CASES
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import joined_rounds, rounds
from tests.lightning_models import make_network, three_losses

pytestmark = pytest.mark.stand_in

STEPS = 8
OPTIONS = [{}, {"denominator": "own"}, {"balance_every": 3}, {"low_memory": True}, {"layers": "module"}]


class Wrapped(DistributedDataParallel):
    """What ``backward`` is told by a wrapper; gloo would refuse to build one around tensors of this device."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module, self.process_group = module, dist.group.WORLD
        self.require_backward_grad_sync, self.static_graph = True, False
        self._join_config = SimpleNamespace(enable=False)

    def forward(self, *inputs):
        return self.module(*inputs)


def trained(rank, options, way):
    """What a rank arrives at, and what it sent in its last step. The stand-in has two devices, one for each."""
    device = f"accel:{rank}"
    torch.get_device_module("accel").set_device(device)
    network = make_network().to(device)
    wrapped = Wrapped(network)
    optimizer = MTAdam(network.named_parameters(), lr=1e-2, **options)
    with late_all_reduces(way) as sent:
        for batches in rounds(2, STEPS, torch.float64):
            sent.clear()
            x, y = batches[rank]
            optimizer.zero_grad()
            optimizer.backward(three_losses(network, (x.to(device), y.to(device)), wrapped), model=wrapped)
            optimizer.step()
        numbers = [parameter.detach().cpu() for parameter in network.parameters()]
    return numbers, list(sent)


def trained_alone(rank, options):
    """In a process of its own too: one that has differentiated anything cannot be forked."""
    network = make_network()
    optimizer = MTAdam(network.named_parameters(), lr=1e-2, **options)
    for batch in joined_rounds(2, STEPS, torch.float64):
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch), model=network)
        optimizer.step()
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("way", ["early", "late"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_ranks_equal_one_process(options, way, tmp_path):
    (first, sent), (second, _) = results(run_ranks(trained, tmp_path, options, way))
    (tmp_path / "alone").mkdir()
    (alone,) = results(run_ranks(trained_alone, tmp_path / "alone", options, ranks=1))
    assert all(asynchronous for _, asynchronous in sent)
    for one, two, expected in zip(first, second, alone, strict=True):
        assert torch.equal(one, two)
        assert float((one - expected).abs().max()) < 1e-6


def watched(rank, options):
    device = f"accel:{rank}"
    torch.get_device_module("accel").set_device(device)
    network = make_network().to(device)
    wrapped = Wrapped(network)
    optimizer = MTAdam(network.named_parameters(), lr=1e-2, **options)
    with late_all_reduces("late"):
        for index, batches in enumerate(rounds(2, 30, torch.float64)):
            x, y = (one.to(device) for one in batches[rank])
            optimizer.zero_grad()
            losses = three_losses(network, (x, y), wrapped)
            with Watch() as watch:
                optimizer.backward(losses, model=wrapped)
                optimizer.step()
            kinds = [kind for kind, *_ in watch.waits]
            if index > 25:
                assert kinds in ([], ["event"]), watch.waits
    return watch.kernels["_foreach_norm.Scalar"]


@pytest.mark.parametrize("options", [{}, {"balance_every": 3}], ids=str)
def test_the_host_waits_for_one_event_and_norms_are_taken_once(options, tmp_path):
    norms = results(run_ranks(watched, tmp_path, options))
    assert norms[0] == norms[1] <= 3


def balanced(rank, case, way):
    from tests.accelerator.test_balancers import Loop

    torch.get_device_module("accel").set_device(rank)
    loop = Loop(case, f"accel:{rank}")
    wrapped = Wrapped(loop.module)
    with late_all_reduces(way):
        for batches in rounds(2, STEPS, torch.float64):
            x, y = (one.to(f"accel:{rank}") for one in batches[rank])
            loop.optimizer.zero_grad()
            losses = case.losses(loop.module.network, (x, y))
            loop.balancer.backward(losses, loop.optimizer, model=wrapped)
            loop.optimizer.step()
    return [parameter.detach().cpu() for parameter in loop.module.parameters()]


GRADIENTS = {name: case for name, case in CASES.items() if name in ("metabalance", "torchjd, with a state")}


@pytest.mark.parametrize("way", ["early", "late"])
@pytest.mark.parametrize("case", GRADIENTS.values(), ids=GRADIENTS)
def test_two_ranks_with_a_balancer_of_gradients(case, way, tmp_path):
    first, second = results(run_ranks(balanced, tmp_path, case, way))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
        assert bool(one.isfinite().all())
