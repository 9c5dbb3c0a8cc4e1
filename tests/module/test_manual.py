"""``backward_terms`` in manual optimization does what the hand-written loop does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_mtadam import MultiTermLightningModule
from lightning_mtadam.balancers import FixedWeights, MetaBalance
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import fit_rank, joined_rounds, rounds
from tests.lightning_models import (
    GAN,
    QUIET,
    Regression,
    adam,
    assert_same,
    fit,
    generator_losses,
    half_precision,
    largest_difference,
    make_gan_parts,
    make_loader,
    make_mtadam,
    make_network,
    sgd,
    three_losses,
    total,
)
from tests.loops import by_hand, gan_by_hand

pytestmark = QUIET


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_a_gan_in_manual_optimization_equals_the_hand_written_loop(make_optimizer, toggle):
    module = GAN(make_optimizer, toggle=toggle)
    trainer = fit(module, make_loader())
    generator, discriminator = gan_by_hand(make_optimizer)
    assert trainer.global_step == 24
    assert_same(module.generator, generator)
    assert_same(module.discriminator, discriminator)
    assert module._pending is None
    tags = {"train/l1", "train/gan", "train/real", "train/fake"}
    assert set(trainer.callback_metrics) == tags | {f"{tag}_epoch" for tag in tags}


@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_gradients_reach_only_the_optimizers_own_parameters(make_optimizer):
    class Watching(GAN):
        def training_step(self, batch, batch_idx):
            generator, _ = self.optimizers()
            self.backward_terms(generator_losses(self.generator, self.discriminator, batch), generator)
            assert all(p.grad is not None for p in self.generator.parameters())
            assert all(p.grad is None for p in self.discriminator.parameters())
            generator.step()
            self.looked = True

    module = Watching(make_optimizer)
    fit(module, make_loader(1), max_epochs=1)
    assert module.looked
    assert_same(module.discriminator, make_gan_parts()[1])
    assert largest_difference(module.generator, make_gan_parts()[0]) > 0


@pytest.mark.parametrize("make_optimizer", [lambda network: make_mtadam(network, eps=1e-2), sgd])
@pytest.mark.parametrize(("limit", "algorithm"), [(1e-3, "norm"), (1e-4, "value")])
def test_clipping_in_manual_optimization_acts(make_optimizer, limit, algorithm):
    class Clipping(GAN):
        def after_backward(self, optimizer):
            self.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)

    module = Clipping(make_optimizer)
    fit(module, make_loader())
    generator, discriminator = gan_by_hand(make_optimizer, clip=(limit, algorithm))
    assert_same(module.generator, generator)
    assert_same(module.discriminator, discriminator)
    assert largest_difference(generator, gan_by_hand(make_optimizer)[0]) > 1e-3


def test_gradients_add_up_over_several_backward_terms_in_manual_optimization():
    class Accumulating(Regression):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            if batch_idx % 2 == 0:
                optimizer.zero_grad()
            self.backward_terms({n: loss / 2 for n, loss in three_losses(self.network, batch).items()}, optimizer)
            if batch_idx % 2:
                optimizer.step()

    module = Accumulating()
    module.automatic_optimization = False
    fit(module, make_loader())
    assert_same(module.network, by_hand(accumulate=2)[0])


def test_step_after_manual_backward_says_to_use_backward_terms():
    class Wrong(Regression):
        def training_step(self, batch, batch_idx):
            self.manual_backward(total(three_losses(self.network, batch)))
            self.optimizers().step()

    module = Wrong()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="backward_terms"):
        fit(module, make_loader())
    assert_same(module.network, make_network())


def adamw(part):
    return torch.optim.AdamW(part.parameters(), lr=1e-2)


class Shared(MultiTermLightningModule):
    """An encoder and a decoder, with an optimizer each; on one graph, or each on a graph of its own."""

    def __init__(self, make_optimizers=(make_mtadam, make_mtadam), balancer=None, shared=True, dtype=torch.float64):
        super().__init__()
        self.automatic_optimization = False
        self.network, self.make_optimizers = make_network(dtype), make_optimizers
        self.made, self.shared = balancer, shared

    def losses(self, batch):
        found = three_losses(self.network, batch)
        return {name: found[name] for name in ("fit", "size")}

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        losses = self.losses(batch)
        self.backward_terms(losses, first, retain_graph=self.shared)
        self.backward_terms(losses if self.shared else self.losses(batch), second)
        first.step()
        second.step()

    def configure_balancer(self):
        return self.made

    def configure_optimizers(self):
        return self.make_optimizers[0](self.network[0]), self.make_optimizers[1](self.network[2])


PAIRS = [(make_mtadam, make_mtadam), (make_mtadam, adamw), (adamw, make_mtadam), (adamw, adamw)]
of_every_pair = pytest.mark.parametrize("pair", PAIRS, ids=["both", "first", "second", "none"])


@of_every_pair
def test_two_optimizers_on_one_graph_equal_two_graphs(pair):
    shared, apart = Shared(pair), Shared(pair, shared=False)
    for module in (shared, apart):
        fit(module, make_loader())
    assert_same(shared, apart)
    assert min(largest_difference(shared.network[at], make_network()[at]) for at in (0, 2)) > 1e-3


@pytest.mark.parametrize("make_balancer", [lambda: FixedWeights({"fit": 1.0, "size": 0.01}), MetaBalance])
def test_a_balancer_that_looks_at_each_layer_alone_balances_both(make_balancer):
    shared, apart = (Shared((adamw, adamw), make_balancer(), shared=flag) for flag in (True, False))
    for module in (shared, apart):
        fit(module, make_loader())
    assert_same(shared, apart)
    assert largest_difference(shared, Shared()) > 1e-3


@of_every_pair
def test_two_optimizers_on_one_graph_under_a_gradient_scaler(pair):
    """In half precision gradients of the two forward passes are equal, too."""
    shared, apart = (Shared(pair, shared=flag, dtype=torch.float32) for flag in (True, False))
    for module in (shared, apart):
        fit(module, make_loader(dtype=torch.float32), plugins=[half_precision(2.0**8)])
    assert_same(shared, apart)


def train_shared(rank, pair):
    module = Shared(pair)
    fit_rank(module, rank, rounds(2, 6, torch.float64))
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@of_every_pair
def test_two_optimizers_on_one_graph_train_alike_on_two_ranks(pair, tmp_path):
    alone = Shared(pair)
    fit(alone, torch.utils.data.DataLoader(list(joined_rounds(2, 6, torch.float64)), batch_size=None), max_epochs=1)
    expected = torch.cat([parameter.detach().flatten() for parameter in alone.parameters()])
    first, second = results(run_ranks(train_shared, tmp_path, pair))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-10)


def train_with_a_static_graph(rank):
    fit_rank(Shared((make_mtadam, adamw)), rank, rounds(2, 2, torch.float64), strategy={"static_graph": True})


def test_a_static_graph_knows_the_backward_pass_of_one_optimizer_only(tmp_path):
    for outcome in run_ranks(train_with_a_static_graph, tmp_path):
        assert "static_graph=True) knows the backward pass of one optimizer, but there are 2" in outcome.error


class Muon(Shared):
    """Muon trains the matrices, another optimizer the rest."""

    def configure_optimizers(self):
        matrices = [parameter for parameter in self.parameters() if parameter.dim() == 2]
        rest = nn.ParameterList([parameter for parameter in self.parameters() if parameter.dim() != 2])
        return torch.optim.Muon(matrices, lr=1e-2), self.make_optimizers[1](rest)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("make_other", [adamw, make_mtadam])
def test_muon_beside_another_optimizer(make_other):
    """Beside AdamW it is what a loop without Lightning makes of one backward pass of the sum."""
    shared, apart = (Muon((None, make_other), shared=flag) for flag in (True, False))
    for module in (shared, apart):
        fit(module, make_loader())
    assert_same(shared, apart)
    if make_other is adamw:
        by_hand = Muon((None, adamw))
        muon, other = by_hand.configure_optimizers()
        for batch in list(make_loader()) * 2:
            by_hand.zero_grad()
            total(by_hand.losses(batch)).backward()
            muon.step()
            other.step()
        assert_same(shared, by_hand)


class SharedGAN(GAN):
    """Both sides take their losses from one forward pass."""

    def __init__(self, make_optimizer=make_mtadam, shared=True):
        super().__init__(make_optimizer)
        self.shared = shared

    def both_losses(self, batch):
        x, y = batch
        fake = self.generator(x)
        real_score, fake_score = self.discriminator(y), self.discriminator(fake)
        return (
            {"l1": (fake - y).abs().mean(), "gan": F.softplus(-fake_score).mean()},
            {"real": F.softplus(-real_score).mean(), "fake": F.softplus(fake_score).mean()},
        )

    def training_step(self, batch, batch_idx):
        generator, discriminator = self.optimizers()
        generator.zero_grad()
        discriminator.zero_grad()
        of_generator, of_discriminator = self.both_losses(batch)
        self.backward_terms(of_generator, generator, retain_graph=self.shared)
        of_discriminator = of_discriminator if self.shared else self.both_losses(batch)[1]
        self.backward_terms(of_discriminator, discriminator)
        generator.step()
        discriminator.step()


@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_the_sides_of_a_gan_may_share_a_forward_pass(make_optimizer):
    shared, apart = (SharedGAN(make_optimizer, shared=flag) for flag in (True, False))
    for module in (shared, apart):
        fit(module, make_loader())
    assert_same(shared, apart)


def test_without_retain_graph_the_second_optimizer_is_told_how_to_keep_it():
    class Forgetful(Shared):
        def training_step(self, batch, batch_idx):
            losses = self.losses(batch)
            for optimizer in self.optimizers():
                self.backward_terms(losses, optimizer)

    module = Forgetful()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        fit(module, make_loader())
    assert module._pending is None
    assert_same(module.network, make_network())


class InPlace(torch.autograd.Function):
    """The loss itself, with twice its gradient, in place."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(2)


@pytest.mark.parametrize("make_optimizer", [make_mtadam, sgd])
def test_a_loss_whose_backward_works_in_place_leaves_the_others_alone(make_optimizer):
    class Doubled(Regression):
        def training_step(self, batch, batch_idx):
            return {name: InPlace.apply(loss) for name, loss in three_losses(self.network, batch).items()}

    class Twice(Regression):
        def training_step(self, batch, batch_idx):
            return {name: 2 * loss for name, loss in three_losses(self.network, batch).items()}

    doubled, twice = Doubled(make_optimizer), Twice(make_optimizer)
    for module in (doubled, twice):
        fit(module, make_loader())
    assert_same(doubled, twice)
