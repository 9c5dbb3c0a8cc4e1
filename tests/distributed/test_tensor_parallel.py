"""Layers that are themselves cut over two processes: equal to one process. Their gradients may come as partial sums."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.distributed.ranks import results, run_ranks
from tests.distributed.sharded import difference, train_rows, wholes
from tests.lightning_models import make_mtadam

PLAN = {"norm": SequenceParallel(), "first": ColwiseParallel(input_layouts=Shard(1)), "last": RowwiseParallel()}


class Sequences(nn.Module):
    """Takes a sequence of two; with a rank, only that one of them goes into the norm."""

    def __init__(self, rank):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.norm, self.first, self.last = nn.LayerNorm(5), nn.Linear(5, 8), nn.Linear(8, 1)
        self.part = slice(None) if rank is None else slice(rank, rank + 1)
        self.double()

    def forward(self, x):
        sequence = torch.stack([x, x.flip(0)], 1)[:, self.part]
        return self.last(self.first(self.norm(sequence)).tanh()).mean(1)


def losses_of(network, batch):
    output = network(batch[0])
    return {"fit": (output - batch[1]).square().mean(), "size": 50 * output.abs().mean()}


def trained(rank):
    network = Sequences(rank)
    if rank is not None:
        parallelize_module(network, init_device_mesh("cpu", (2,)), PLAN)
    train_rows(network, make_mtadam(network), None, losses=losses_of, clip=(0.5, "norm"))
    return wholes(network)


@pytest.mark.filterwarnings("ignore:DTensor random operators")
def test_tensor_parallel_ranks_equal_one_process(tmp_path):
    expected = trained(None)
    assert difference(expected, wholes(Sequences(None))) > 0.01, "it has been trained"
    for weights in results(run_ranks(trained, tmp_path)):
        assert difference(weights, expected) < 1e-12
