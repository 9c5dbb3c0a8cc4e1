"""What checkpointed segments count while they are run again, which is once for each term, does not count."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mtadam import MTAdam, MultiTermLightningModule
from lightning_mtadam.balancers import FixedWeights, GradNorm, MetaBalance, OutputBalancer
from tests.lightning_models import QUIET, assert_same, fit, make_loader, make_mtadam

TERMS = 10
X = torch.randn(16, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Segment(nn.Module):
    """With normalising layers, run under a checkpoint or not."""

    def __init__(self, *, checkpointed, kind=nn.BatchNorm1d, **options):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.body = nn.Sequential(nn.Linear(3, 4), kind(4, **options), nn.Tanh())
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x))

    def losses(self, x):
        output = self(x)
        return {f"term{index}": (output - index).abs().pow(1 + index / TERMS).mean() for index in range(TERMS)}


def assert_same_everywhere(first, second):
    assert_same(first, second)
    for (name, one), two in zip(first.named_buffers(), second.buffers(), strict=True):
        assert torch.equal(one, two), name


def trained(backward_of, steps=3, **options):
    network = Segment(**options)
    optimizer, backward = backward_of(network)
    for step in range(steps):
        optimizer.zero_grad()
        backward(network.losses(X + step))
        optimizer.step()
    return network


def mtadam(**options):
    def make(network):
        optimizer = make_mtadam(network, **options)
        return optimizer, optimizer.backward

    return make


def balanced(make_balancer):
    def make(network):
        optimizer, balancer = torch.optim.Adam(network.parameters(), lr=1e-2), make_balancer()
        balancer.attach(network)
        return optimizer, lambda losses: balancer.backward(losses, optimizer, model=network)

    return make


WAYS = {
    "mtadam": mtadam(),
    "light": mtadam(balance_every=2),
    "low memory": mtadam(low_memory=True),
    "metabalance": balanced(MetaBalance),
    "gradnorm": balanced(lambda: GradNorm("head")),
    "output": balanced(lambda: OutputBalancer("head")),
    "fixed": balanced(lambda: FixedWeights({f"term{index}": 1.0 for index in range(TERMS)})),
}


@pytest.mark.parametrize("way", WAYS)
def test_running_statistics_are_those_without_a_checkpoint(way):
    plain, checkpointed = (trained(WAYS[way], checkpointed=flag) for flag in (False, True))
    assert_same_everywhere(checkpointed, plain)
    assert int(checkpointed.body[1].num_batches_tracked) == 3


def test_a_momentum_of_a_tenth_acts_as_one():
    """As 0.7 it would if the segment counted once for each of ten terms."""
    network = Segment(checkpointed=True)
    optimizer = make_mtadam(network)
    with torch.no_grad():
        mean = network.body[0](X).mean(0)
    optimizer.backward(network.losses(X))
    torch.testing.assert_close(network.body[1].running_mean, 0.1 * mean)


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False, "momentum": 0.9}], ids=str
)
def test_whatever_the_options_of_the_layer(options):
    plain, checkpointed = (trained(mtadam(), checkpointed=flag, **options) for flag in (False, True))
    assert_same_everywhere(checkpointed, plain)


def test_a_frozen_layer_stays_as_it_is():
    network = Segment(checkpointed=True)
    network.body[1].eval()
    make_mtadam(network).backward(network.losses(X))
    assert not network.body[1].running_mean.any()


def test_under_a_retained_graph_and_after_an_error_too():
    network = Segment(checkpointed=True)
    first, second = MTAdam(network.body.named_parameters()), MTAdam(network.head.named_parameters())
    losses = network.losses(X)
    kept = [buffer.clone() for buffer in network.buffers()]
    first.backward(losses, retain_graph=True)
    second.backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        second.backward(losses)
    assert all(map(torch.equal, kept, network.buffers()))


def test_a_forward_pass_elsewhere_meanwhile_counts():
    """Another thread may run one while a backward pass of this one is under way."""
    from threading import Thread

    other = nn.BatchNorm1d(3, dtype=torch.float64)

    class Meanwhile(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            thread = Thread(target=other, args=(X,))
            thread.start()
            thread.join()
            return gradient

    network = Segment(checkpointed=True)
    output = Meanwhile.apply(network(X))
    make_mtadam(network).backward({"fit": output.square().mean(), "size": output.abs().mean()})
    assert int(other.num_batches_tracked) == 3  # one of them looks for gradients that no loss gives
    assert int(network.body[1].num_batches_tracked) == 1


class Module(MultiTermLightningModule):
    def __init__(self, checkpointed):
        super().__init__()
        self.network = Segment(checkpointed=checkpointed)

    def training_step(self, batch, batch_idx):
        return self.network.losses(batch[0])

    def configure_optimizers(self):
        return make_mtadam(self.network)


@QUIET
def test_under_the_trainer_as_well():
    plain, checkpointed = Module(False), Module(True)
    for module in (plain, checkpointed):
        fit(module, make_loader())
    assert_same_everywhere(checkpointed, plain)
