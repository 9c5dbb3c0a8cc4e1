"""The LightningModule: three terms for the generator, and a discriminator."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from example_projects.common.image_module import ImageModule, Images
from example_projects.common.methods import Method
from example_projects.srgan.networks import SCALE, Discriminator, Generator
from example_projects.srgan.perceptual import PerceptualLoss

# The prescribed weight of the perceptual term, 0.006, is the paper's factor of 1 / 12.75 on VGG's features, squared.
LAMBDAS = {
    "balanced": {"mse": 1.0, "gan": 0.001, "perceptual": 0.006},
    "unbalanced": {"mse": 1.0, "gan": 1.0, "perceptual": 1.0},
}
BETAS = (0.9, 0.999)


def bicubic(low: Tensor) -> Tensor:
    """Enlarge without having learnt anything. [B, 3, H, W] -> [B, 3, 4H, 4W], in [-1, 1]."""
    # Of torch's two bicubic kernels, the one for antialiasing is that of Pillow and Matlab.
    return F.interpolate(low, scale_factor=SCALE, mode="bicubic", antialias=True).clamp(-1, 1)


@torch.no_grad()
def enlarged(generator: nn.Module, batch: tuple[Tensor, Tensor]) -> Images:
    """What the generator makes of the small images of a batch, in [-1, 1]."""
    low, truth = batch
    return Images(low, generator(low).clamp(-1, 1), truth)


def generator_losses(
    made: Tensor, truth: Tensor, discriminator: nn.Module, perceptual: PerceptualLoss
) -> dict[str, Tensor]:
    """The raw terms of the generator; only "gan" passes through the discriminator.

    Args:
        made: [B, 3, S, S].
        truth: [B, 3, S, S].
        discriminator: from images to logits.
        perceptual: compares images.
    """
    return {
        "mse": F.mse_loss(made, truth),
        "gan": F.softplus(-discriminator(made)).mean(),  # -log D(made)
        "perceptual": perceptual(made, truth),
    }


def discriminator_losses(made: Tensor, truth: Tensor, discriminator: nn.Module) -> dict[str, Tensor]:
    """-log D(truth) and -log(1 - D(made))."""
    return {
        "d_real": F.softplus(-discriminator(truth)).mean(),
        "d_fake": F.softplus(discriminator(made)).mean(),
    }


class SRGAN(ImageModule):
    """Makes photographs four times larger.

    Args:
        method: how the generator is trained.
        lambdas: what each of its terms is multiplied by.
        lr: learning rate.
        perceptual: the third term; it is no part of the module, of its checkpoints and of its parameters.
        epochs: of training; in their second half the learning rate is a tenth.
        image_size: of the crops to train on.
        width: channels of both networks' first convolution.
        blocks: of the generator.
    """

    def __init__(
        self,
        method: Method,
        lambdas: Mapping[str, float],
        lr: float,
        perceptual: PerceptualLoss,
        *,
        epochs: int,
        image_size: int = 96,
        width: int = 64,
        blocks: int = 16,
    ) -> None:
        super().__init__(method, lambdas, lr)
        self.generator, self.discriminator = Generator(width, blocks), Discriminator(image_size, width)
        self.perceptual, self.epochs = perceptual, epochs

    def on_fit_start(self) -> None:
        """Take the perceptual loss to the module's device."""
        self.perceptual.to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One step of the discriminator, then one of the generator."""
        low, truth = batch
        generator, discriminator = self.optimizers()
        made = self.generator(low)
        self.update(discriminator_losses(made.detach(), truth, self.discriminator), discriminator)
        self.update(self.weighted(generator_losses(made, truth, self.discriminator, self.perceptual)), generator)

    def generate(self, batch: tuple[Tensor, Tensor]) -> Images:
        """Enlarge."""
        return enlarged(self.generator, batch)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """The method's for the generator, Adam for the discriminator."""
        optimizers = [
            self.method.configure(self.generator.named_parameters("generator"), self.lr, BETAS),
            Adam(self.discriminator.parameters(), self.lr, BETAS),
        ]
        return optimizers, [MultiStepLR(optimizer, [(self.epochs + 1) // 2]) for optimizer in optimizers]
