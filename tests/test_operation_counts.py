"""Every term's backward pass runs what it must and nothing else, by counting matrix products instead of seconds.

No two layers have the same shape, and none has the size of the batch, so a product's shapes tell its layer and whether
it is of the forward pass ("forward"), gives the gradient of the layer's weight ("weight"), or of its input ("input").
"""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_mtadam import MTAdam, MultiTermLightningModule
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import fit_rank
from tests.lightning_models import QUIET, make_trainer

pytestmark = QUIET

BATCH = 4
X = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(0))


class Products(TorchDispatchMode):
    """Counts the matrix products of a network's linear layers.

    Attributes:
        counts: by (layer, "forward" | "weight" | "input").
    """

    def __init__(self, network):
        super().__init__()
        linear = [(name, part) for name, part in network.named_modules() if isinstance(part, nn.Linear)]
        self.layers = {frozenset(part.weight.shape): name for name, part in linear}
        assert len(self.layers) == len(linear)
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            self.counts[self.layers[frozenset(args[2].shape)], "forward"] += 1
        elif func is torch.ops.aten.mm.default:
            left, right = args
            weight = left.shape[1] == BATCH
            shape = (left.shape[0], right.shape[1]) if weight else right.shape
            self.counts[self.layers[frozenset(shape)], "weight" if weight else "input"] += 1
        return func(*args, **(kwargs or {}))


def count(work, network):
    """The products by layer, and the FLOPs of all operations together."""
    with FlopCounterMode(display=False) as flops, Products(network) as products:
        work()
    return dict(products.counts), flops.get_total_flops()


def flops_of(counts, network):
    """What these products, and nothing else, take."""
    return sum(times * 2 * BATCH * network.get_submodule(layer).weight.numel() for (layer, _), times in counts.items())


class MultiTask(nn.Module):
    """A trunk of two layers, and a head for each of two tasks."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 11))
        self.depth, self.label = nn.Linear(11, 3), nn.Linear(11, 2)

    def forward(self, x):
        features = self.trunk(x)
        return {
            "depth": self.depth(features).square().mean(),
            "label": self.label(features).logsumexp(1).mean(),
            "features": features.square().mean(),
        }


FORWARD = {(layer, "forward"): 1 for layer in ("trunk.0", "trunk.2", "depth", "label")}
BACKWARD = {
    # three terms meet at the features; the first layer's input needs no gradient
    ("trunk.0", "weight"): 3,
    ("trunk.2", "weight"): 3,
    ("trunk.2", "input"): 3,
    # each head for its own term
    ("depth", "weight"): 1,
    ("depth", "input"): 1,
    ("label", "weight"): 1,
    ("label", "input"): 1,
}


def times(factor, counts):
    return {key: factor * value for key, value in counts.items()}


class MultiTaskModule(MultiTermLightningModule):
    """The same through Lightning."""

    def __init__(self, **options):
        super().__init__()
        self.network, self.options = MultiTask(), options

    def training_step(self, batch, batch_idx):
        return self.network(batch[0])

    def configure_optimizers(self):
        return MTAdam(self.network.named_parameters(), **self.options)


def batches(number):
    return DataLoader(TensorDataset(X.repeat(number, 1)), BATCH)


def test_the_trunk_runs_once_per_term_and_each_head_for_its_own_term():
    network = MultiTask()
    losses, optimizer = network(X), MTAdam(network.named_parameters())
    counts, flops = count(lambda: optimizer.backward(losses), network)
    assert counts == BACKWARD
    assert flops == flops_of(BACKWARD, network)


def test_the_counting_tells_one_pass_from_several():
    """The pass over the sum, which a plain optimizer takes."""
    network = MultiTask()
    losses = network(X)
    counts, flops = count(lambda: sum(losses.values()).backward(), network)
    assert counts == dict.fromkeys(BACKWARD, 1)
    assert flops == flops_of(counts, network)


def test_a_step_after_the_backward_passes_multiplies_no_matrices():
    network = MultiTask()
    optimizer = MTAdam(network.named_parameters())
    optimizer.backward(network(X))
    assert count(optimizer.step, network) == ({}, 0)


def test_gradients_that_accumulate_cost_nothing_more():
    network = MultiTask()
    optimizer = MTAdam(network.named_parameters())
    optimizer.backward(network(X))
    losses = network(X)
    assert count(lambda: optimizer.backward(losses), network)[0] == BACKWARD


def test_a_frozen_trunk_is_not_traversed():
    network = MultiTask()
    network.trunk.requires_grad_(False)
    losses, optimizer = network(X), MTAdam(network.named_parameters())
    del losses["features"]
    counts, _ = count(lambda: optimizer.backward(losses), network)
    assert counts == {("depth", "weight"): 1, ("label", "weight"): 1}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_through_lightning_a_step_is_one_forward_and_the_same_backward_passes(accumulate):
    module = MultiTaskModule()
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
    counts, flops = count(lambda: trainer.fit(module, batches(2)), module.network)
    assert counts == times(2, {**FORWARD, **BACKWARD})
    assert flops == flops_of(counts, module.network)


def count_rank(rank):
    module = MultiTaskModule()
    return count(lambda: fit_rank(module, rank, [[(X,), (X,)]]), module.network)[0]


def test_under_ddp_each_rank_does_the_same(tmp_path):
    for counts in results(run_ranks(count_rank, tmp_path)):
        assert counts == {**FORWARD, **BACKWARD}


class Nets(nn.Module):
    """A generator and a discriminator."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))

    def generator_losses(self):
        fake = self.generator(X)
        return {"l1": fake.abs().mean(), "gan": F.softplus(-self.discriminator(fake)).mean()}

    def discriminator_losses(self):
        real, fake = torch.ones(BATCH, 6), self.generator(X)  # not detached
        return {name: F.softplus(self.discriminator(x)).mean() for name, x in {"real": real, "fake": fake}.items()}


L1 = {("generator.0", "weight"): 1, ("generator.2", "weight"): 1, ("generator.2", "input"): 1}
# through the discriminator to its input, past its weights
GAN = {**L1, ("discriminator.0", "input"): 1, ("discriminator.2", "input"): 1}
# one of "real" and "fake": never to the discriminator's input, let alone to the generator
JUDGE = {("discriminator.0", "weight"): 1, ("discriminator.2", "weight"): 1, ("discriminator.2", "input"): 1}


@pytest.mark.parametrize(("term", "expected"), [("l1", L1), ("gan", GAN)])
def test_the_pixel_loss_never_meets_the_discriminator_nor_the_gan_loss_its_weights(term, expected):
    nets = Nets()
    losses, optimizer = nets.generator_losses(), MTAdam(nets.generator.named_parameters("generator"))
    counts, flops = count(lambda: optimizer.backward({term: losses[term]}), nets)
    assert counts == expected
    assert flops == flops_of(expected, nets)


def test_the_discriminators_terms_never_meet_the_generator():
    nets = Nets()
    losses, optimizer = nets.discriminator_losses(), MTAdam(nets.discriminator.named_parameters())
    assert count(lambda: optimizer.backward(losses), nets)[0] == times(2, JUDGE)


class GANModule(MultiTermLightningModule):
    """One step of each network, under manual optimization; counts the backward passes of each."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.automatic_optimization = False
        self.nets, self.make_optimizer = Nets(), make_optimizer
        self.counts = {}

    def training_step(self, batch, batch_idx):
        generator, discriminator = self.optimizers()
        for name, optimizer, losses in (
            ("generator", generator, self.nets.generator_losses()),
            ("discriminator", discriminator, self.nets.discriminator_losses()),
        ):
            optimizer.zero_grad()
            self.counts[name], _ = count(lambda: self.backward_terms(losses, optimizer), self.nets)  # noqa: B023
        # steps come last: they change weights that the other's graph needs
        for optimizer in (generator, discriminator):
            optimizer.step()

    def configure_optimizers(self):
        parts = (self.nets.generator, self.nets.discriminator)
        return [self.make_optimizer(part.parameters()) for part in parts]


@pytest.mark.parametrize(
    ("make_optimizer", "generator", "discriminator"),
    [
        (MTAdam, Counter(L1) + Counter(GAN), times(2, JUDGE)),
        (torch.optim.Adam, GAN, times(2, JUDGE)),  # one pass over the sum
    ],
)
def test_with_two_optimizers_each_pass_stays_with_its_own_network(make_optimizer, generator, discriminator):
    module = GANModule(make_optimizer)
    make_trainer(max_epochs=1).fit(module, batches(1))
    assert module.counts == {"generator": dict(generator), "discriminator": discriminator}
