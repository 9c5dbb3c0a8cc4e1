"""Ranks equal each other to the bit, and one process on all their batches to the rounding."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lightning_mtadam.distributed import averaging
from tests.distributed.cases import CASES
from tests.distributed.ranks import TWO_OR_THREE, results, run_ranks
from tests.distributed.training import (
    ROUNDING,
    STEPS,
    all_equal,
    assert_ranks_equal_one_process,
    fit_rank,
    join,
    joined_rounds,
    largest,
    rounds,
    train_alone,
    train_together,
)
from tests.lightning_models import GAN, QUIET, adam, discriminator_losses, generator_losses, make_gan_parts, make_mtadam
from tests.loops import gan_by_hand

pytestmark = QUIET


@TWO_OR_THREE
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process_on_the_joined_batch(name, ranks, tmp_path):
    assert_ranks_equal_one_process(CASES[name], ranks, tmp_path)


def without_averaging(rank, case):
    done = SimpleNamespace(wait=lambda: None)
    averaging.dist = SimpleNamespace(all_reduce=lambda *args, **options: done, get_world_size=lambda group: 1)
    return train_together(rank, case, 2, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.strategy])
def test_without_averaging_the_ranks_differ(name, tmp_path):
    """Nothing above would be shown if the ranks' own batches led to the same network."""
    first, second = results(run_ranks(without_averaging, tmp_path, CASES[name]))
    alone = train_alone(CASES[name], 2, torch.float64)
    assert largest(first["parameters"], second["parameters"]) > 1e-3
    assert largest(first["parameters"], alone["parameters"]) > 1e-3


class AccumulatingGAN(GAN):
    """Both optimizers step on every second batch, and gradients are averaged there only."""

    def training_step(self, batch, batch_idx):
        last = batch_idx % 2 == 1
        for optimizer, losses in zip(self.optimizers(), GAN_LOSSES, strict=True):
            with optimizer.toggle_model(sync_grad=last):
                found = losses(self.generator, self.discriminator, batch)
                self.backward_terms({name: loss / 2 for name, loss in found.items()}, optimizer)
        for optimizer in self.optimizers() if last else ():
            optimizer.step()
            optimizer.zero_grad()


def accumulating_gan_by_hand(batches, dtype):
    networks = make_gan_parts(dtype)
    optimizers = [make_mtadam(network) for network in networks]
    for pair in zip(batches[::2], batches[1::2], strict=True):
        for optimizer, losses in zip(optimizers, GAN_LOSSES, strict=True):
            optimizer.zero_grad()
            optimizer.backward(losses(*networks, join(pair)))
        for optimizer in optimizers:
            optimizer.step()
    return networks


GAN_LOSSES = (generator_losses, discriminator_losses)


def choose(*make_optimizers):
    """An optimizer for the generator, and another for the discriminator."""
    return lambda network: make_optimizers[network[-1].out_features == 1](network)


def with_optimizers(*make_optimizers):
    make = choose(*make_optimizers)
    return partial(GAN, make), lambda batches, dtype: gan_by_hand(make, batches=batches, dtype=dtype)


GANS = {
    "Adam for both": with_optimizers(adam, adam),
    "MTAdam and Adam": with_optimizers(make_mtadam, adam),
    "Adam and MTAdam": with_optimizers(adam, make_mtadam),
    "both networks": (GAN, lambda batches, dtype: gan_by_hand(batches=batches, dtype=dtype)),
    "toggled": (partial(GAN, toggle=True), lambda batches, dtype: gan_by_hand(batches=batches, dtype=dtype)),
    "accumulating without sync": (AccumulatingGAN, accumulating_gan_by_hand),
}


def train_gan(rank, ranks, make):
    found = []
    for dtype in ROUNDING:
        module = make(dtype=dtype)
        module.log_terms = False
        # needed by Adam alone: DDP's reducer is to expect a pass through one network only
        fit_rank(module, rank, rounds(ranks, STEPS, dtype), strategy={"find_unused_parameters": True})
        found.append([parameter.detach() for parameter in module.parameters()])
    return found


@TWO_OR_THREE
@pytest.mark.parametrize("name", GANS)
def test_a_gan_with_two_optimizers_equals_one_process(name, ranks, tmp_path):
    make, by_hand = GANS[name]
    together = results(run_ranks(train_gan, tmp_path, ranks, make, ranks=ranks))
    for dtype, (first, *others) in zip(ROUNDING, zip(*together, strict=True), strict=True):
        assert all(all_equal(first, other) for other in others)
        alone = by_hand(joined_rounds(ranks, STEPS, dtype), dtype)
        assert largest(first, [p.detach() for network in alone for p in network.parameters()]) < ROUNDING[dtype]
        assert largest(first, [p.detach() for network in make_gan_parts(dtype) for p in network.parameters()]) > 0.01
