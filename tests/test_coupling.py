"""What couples the samples of a batch is refused by name, and nothing else is."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm

from lightning_mtadam import partitioned_losses
from lightning_mtadam.coupling import refusing_coupled_samples

TERMS = ("a", "b", "c")
X, MEMBERS = torch.ones(4, 2), torch.tensor([0, 1, 0, 2])


class Normed(nn.Module):
    """Calls the function, not the module."""

    def forward(self, x):
        return F.batch_norm(x, None, None, None, None, True)


def unnormed(kind, **options):
    return nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.ReLU(), kind(4, **options)))


COUPLED = {
    "BatchNorm": (unnormed(nn.BatchNorm1d), "'1.1' (BatchNorm1d)"),
    "SyncBatchNorm": (unnormed(nn.SyncBatchNorm), "'1.1' (SyncBatchNorm)"),
    "without running statistics": (unnormed(nn.BatchNorm1d, track_running_stats=False).eval(), "'1.1' (BatchNorm1d)"),
    "a single module": (nn.BatchNorm1d(2), "BatchNorm1d"),
    "functional in a module": (nn.Sequential(Normed()), "'0' (Normed)"),
    "functional": (
        lambda x: F.batch_norm(x, torch.zeros(2), torch.ones(2), training=True),
        "batch_norm(training=True)",
    ),
    "torch.batch_norm": (
        lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        "batch_norm(training=True)",
    ),
    "compiled": (torch.compile(unnormed(nn.BatchNorm1d), backend="eager"), "'_orig_mod.1.1' (BatchNorm1d)"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile, of its own
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_samples_are_refused_naming_the_module(name):
    network, named = COUPLED[name]
    torch.compiler.reset()
    with pytest.raises(ValueError, match="^" + re.escape(f"{named} normalises by the mean and variance of the batch")):
        partitioned_losses(lambda x: network(x).sum(1), X, MEMBERS, TERMS)


def test_the_module_is_named_as_in_the_lightning_module():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = unnormed(nn.BatchNorm1d)

        def per_row(self, x):
            return self.network(x).sum(1)

    with pytest.raises(ValueError, match=r"^'network\.1\.1' \(BatchNorm1d\) normalises"):
        partitioned_losses(Owner().per_row, X, MEMBERS, TERMS)


def test_a_batch_norm_over_several_processes_is_refused():
    """The autograd function by itself: the module runs it on accelerators only."""
    x, one = torch.ones(4, 3, device="meta"), torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="normalises by the mean"), refusing_coupled_samples():
        SyncBatchNorm.apply(x, one, one, None, None, 1e-5, 0.1, None, 2)


UNCOUPLED = {
    "BatchNorm in evaluation mode": unnormed(nn.BatchNorm1d).eval(),
    "InstanceNorm": nn.Sequential(nn.Unflatten(1, (1, 2)), nn.InstanceNorm1d(1, affine=True), nn.Flatten()),
    "GroupNorm": unnormed(partial(nn.GroupNorm, 2)),
    "LayerNorm": unnormed(nn.LayerNorm),
    "compiled": torch.compile(unnormed(nn.BatchNorm1d).eval(), backend="eager", dynamic=True),
}


@pytest.mark.parametrize("name", UNCOUPLED)
def test_normalisation_of_each_sample_by_itself_is_not_refused(name):
    network = UNCOUPLED[name]
    torch.compiler.reset()
    x = torch.randn(8, 2)
    losses = partitioned_losses(lambda x: network(x).square().sum(1), x, torch.arange(8) % 3, TERMS)
    torch.testing.assert_close(sum(losses.values()), network(x).square().sum(1).mean())


def test_a_compiled_network_is_compiled_once_for_all_steps():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    network = torch.compile(nn.Linear(20, 1), backend=backend, dynamic=True)
    for step in range(4):
        rows = 6 + step
        partitioned_losses(lambda x: network(x).sum(1), torch.randn(rows, 20), torch.arange(rows) % 3, TERMS)
    assert len(compiled) == 1
