"""In manual optimization a balancer is for the losses of one optimizer; the others train on their plain sum."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mtadam.balancers import FixedWeights, GradNorm, SharedLayerBalancer
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import fit_rank, joined_rounds, rounds
from tests.lightning_models import (
    GAN,
    QUIET,
    adam,
    assert_same,
    discriminator_losses,
    fit,
    generator_losses,
    make_gan_parts,
    make_loader,
)
from tests.loops import take_step

pytestmark = QUIET
WEIGHTS = {"l1": 3.0, "gan": 0.1}
BALANCERS = {
    "fixed": lambda: FixedWeights(WEIGHTS),
    "gradnorm": lambda: GradNorm(shared="generator.0"),
    "shared layer": lambda: SharedLayerBalancer("generator.0", at="output"),
}


class BalancedGAN(GAN):
    """Balances the generator's losses."""

    def __init__(self, balancer):
        super().__init__(adam)
        self.balancer = balancer

    def training_step(self, batch, batch_idx):
        for optimizer, losses in zip(self.optimizers(), (generator_losses, discriminator_losses), strict=True):
            optimizer.zero_grad()
            found = losses(self.generator, self.discriminator, batch)
            self.backward_terms(found, optimizer, balanced=losses is generator_losses)
            optimizer.step()


def test_the_generator_is_balanced_and_the_discriminator_is_not():
    module = BalancedGAN(FixedWeights(WEIGHTS))
    fit(module, make_loader())
    generator, discriminator = make_gan_parts()
    optimizers = [adam(generator), adam(discriminator)]
    for batch in list(make_loader()) * 2:
        for optimizer, losses in zip(optimizers, (generator_losses, discriminator_losses), strict=True):
            found = losses(generator, discriminator, batch)
            if losses is generator_losses:
                found = {name: WEIGHTS[name] * loss for name, loss in found.items()}
            take_step(optimizer, found)
    assert_same(module.generator, generator)
    assert_same(module.discriminator, discriminator)


def rank_of(rank, make):
    module = BalancedGAN(make())
    fit_rank(module, rank, rounds(2, 6, torch.float64), strategy={"find_unused_parameters": True})
    return [parameter.detach() for parameter in module.parameters()]


@pytest.mark.parametrize("make", BALANCERS.values(), ids=BALANCERS)
def test_two_ranks_equal_one_process(make, tmp_path):
    first, second = results(run_ranks(rank_of, tmp_path, make))
    alone = BalancedGAN(make())
    fit(alone, DataLoader(joined_rounds(2, 6, torch.float64), batch_size=None), max_epochs=1)
    for one, two, expected in zip(first, second, alone.parameters(), strict=True):
        assert torch.equal(one, two)
        assert float((one - expected.detach()).abs().max()) < 1e-6
