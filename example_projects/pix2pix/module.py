"""The LightningModule: a U-Net trained on an L1 and a GAN term, against a conditional PatchGAN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from example_projects.common.image_module import ImageModule, Images, linear_decay
from example_projects.common.methods import Method
from example_projects.common.patchgan import PatchGAN, initialise, log_loss
from example_projects.pix2pix.networks import BatchStatistics, UNet

BETAS = (0.5, 0.999)
SAMPLING_SEED = 0  # of the dropout in validation, so that samples of all epochs and methods are comparable


class Pix2Pix(ImageModule):
    """Translates images that come in pairs.

    Args:
        method: how the generator is trained.
        lambdas: of "l1" and "gan".
        lr: learning rate of both networks.
        epochs: of the whole training, over which the learning rate falls.
        size: height and width of the images.
        width: channels of the networks' first layers.
        beta1: of the generator's optimizer.

    References:
        Isola et al., Image-to-Image Translation with Conditional Adversarial Networks, CVPR 2017.
    """

    def __init__(
        self,
        method: Method,
        lambdas: Mapping[str, float],
        lr: float,
        *,
        epochs: int,
        size: int = 256,
        width: int = 64,
        beta1: float = BETAS[0],
    ) -> None:
        super().__init__(method, lambdas, lr)
        self.epochs, self.betas = epochs, (beta1, BETAS[1])
        self.generator = UNet(size, width)
        self.discriminator = PatchGAN(6, width, norm=BatchStatistics)
        initialise(self.generator)
        initialise(self.discriminator)

    def score(self, source: Tensor, target: Tensor) -> Tensor:
        """The discriminator's logits for a pair. 2 x [B, 3, H, W] -> [B, 1, H', W']."""
        logits: Tensor = self.discriminator(torch.cat([source, target], 1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One step of the discriminator, then one of the generator."""
        source, target = batch
        generator, discriminator = self.optimizers()
        made = self.generator(source)
        self.update(self.discriminator_losses(source, target, made.detach()), discriminator)
        self.update(self.weighted(self.generator_losses(source, target, made)), generator)

    def discriminator_losses(self, source: Tensor, target: Tensor, made: Tensor) -> dict[str, Tensor]:
        """Half the GAN loss of real and of made pairs."""
        return {
            "d_real": 0.5 * log_loss(self.score(source, target), real=True),
            "d_fake": 0.5 * log_loss(self.score(source, made), real=False),
        }

    def generator_losses(self, source: Tensor, target: Tensor, made: Tensor) -> dict[str, Tensor]:
        """The raw terms: the mean absolute error, and the GAN loss of passing for real."""
        return {"l1": F.l1_loss(made, target), "gan": log_loss(self.score(source, made), real=True)}

    def generate(self, batch: tuple[Tensor, Tensor]) -> Images:
        """Translate, with the same noise every time."""
        source, target = batch
        with torch.random.fork_rng([source.device] if source.is_cuda else []):
            torch.manual_seed(SAMPLING_SEED)
            return Images(source, self.generator(source), target)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        """The method's optimizer for the generator, the original's Adam for the discriminator."""
        optimizers = [
            self.method.configure(self.generator.named_parameters("generator"), self.lr, self.betas),
            Adam(self.discriminator.parameters(), lr=self.lr, betas=BETAS),
        ]
        return optimizers, [linear_decay(optimizer, self.epochs) for optimizer in optimizers]
