"""``backward_terms`` in manual optimization does what the hand-written loop does."""

import pytest

from tests.lightning_models import (
    GAN,
    QUIET,
    Regression,
    adam,
    assert_same,
    fit,
    generator_losses,
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
