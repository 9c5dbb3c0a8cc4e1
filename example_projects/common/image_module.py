"""What the LightningModules of all image projects have in common: a generator and its rival, optimized by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from example_projects.common.methods import Method
from lightning_mtadam import MultiTermLightningModule


class Images(NamedTuple):
    """What samples show and metrics compare, float [B, 3, H, W] in [-1, 1]; inputs may be smaller.

    Attributes:
        inputs: what the generator was given.
        outputs: what it made of them.
        truths: what it should have made.
    """

    inputs: Tensor
    outputs: Tensor
    truths: Tensor


class ImageModule(MultiTermLightningModule):
    """Trains a generator on several terms, one of them its discriminator's, under manual optimization.

    A project defines the networks, ``training_step``, ``generate`` and ``configure_optimizers``.

    Args:
        method: how the generator is trained; the discriminator is always trained as in the original.
        lambdas: what each of the generator's terms is multiplied by, in the order of the terms, the anchor first.
        lr: learning rate, of generator and discriminator.
    """

    def __init__(self, method: Method, lambdas: Mapping[str, float], lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.method, self.lambdas, self.lr = method.on(lambdas), dict(lambdas), lr

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the generator's terms."""
        return tuple(self.lambdas)

    def generate(self, batch: Any) -> Images:
        """What the generator makes of a batch of the hold-out set."""
        raise NotImplementedError

    def weighted(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The generator's terms, each times its lambda."""
        return {term: factor * losses[term] for term, factor in self.lambdas.items()}

    def update(self, losses: dict[str, Tensor], optimizer: Optimizer) -> None:
        """One step of an optimizer on its losses."""
        optimizer.zero_grad()
        self.backward_terms(losses, optimizer)
        optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Images:
        """Leave the images to the callbacks, which measure and show them."""
        return self.generate(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Images:
        """As in validation."""
        return self.generate(batch)

    def on_train_epoch_end(self) -> None:
        """Advance the learning rates, which manual optimization leaves to the module."""
        schedulers = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()


def linear_decay(optimizer: Optimizer, epochs: int) -> LambdaLR:
    """The schedule of pix2pix and CycleGAN: constant in the first half of all epochs, then linearly towards zero."""
    falling = epochs // 2
    return LambdaLR(optimizer, lambda epoch: 1 - max(0, epoch + 1 - (epochs - falling)) / (falling + 1))
