"""The LightningModule: two generators on six terms, two discriminators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from example_projects.common.image_module import ImageModule, Images, linear_decay
from example_projects.common.methods import Method
from example_projects.cyclegan.image_pool import ImagePool
from example_projects.cyclegan.losses import DOMAINS, discriminator_loss, generator_losses
from example_projects.cyclegan.networks import Generator, discriminator

BETAS = (0.5, 0.999)


class CycleGAN(ImageModule):
    """Translates between two domains. A batch is (A, B), each [B, 3, H, W] in [-1, 1].

    Args:
        method: how the generators are trained.
        lambdas: what each of their terms is multiplied by.
        lr: learning rate of generators and discriminators.
        epochs: of the whole training, in the second half of which the learning rate falls; ``None``: it stays.
        width: channels of the networks' first convolutions.
        blocks: residual blocks of a generator.
        pool_size: how many generated images of each domain are kept for the discriminators.
        beta1: of the generators' optimizer.

    References:
        Zhu et al., Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks, ICCV 2017.
    """

    def __init__(
        self,
        method: Method,
        lambdas: Mapping[str, float],
        lr: float,
        *,
        epochs: int | None,
        width: int = 64,
        blocks: int = 9,
        pool_size: int = 50,
        beta1: float = BETAS[0],
    ) -> None:
        super().__init__(method, lambdas, lr)
        self.epochs, self.betas = epochs, (beta1, BETAS[1])
        self.generators = nn.ModuleDict({domain: Generator(width, blocks) for domain in DOMAINS})
        self.discriminators = nn.ModuleDict({domain: discriminator(width) for domain in DOMAINS})
        self.pools = {domain: ImagePool(pool_size) for domain in DOMAINS}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Train the generators on the six terms, then the discriminators on what was generated."""
        generator_optimizer, discriminator_optimizer = self.optimizers()
        real = dict(zip(DOMAINS, batch, strict=True))
        made = self.translate(real)
        losses = generator_losses(
            real,
            cycled=self.translate(made),
            kept={domain: self.generators[domain](real[domain]) for domain in DOMAINS},
            scores={domain: self.discriminators[domain](made[domain]) for domain in DOMAINS},
        )
        self.update(self.weighted(losses), generator_optimizer)
        judged = {f"discriminator_{domain}": self.judge(domain, real[domain], made[domain]) for domain in DOMAINS}
        self.update(judged, discriminator_optimizer)

    def translate(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make each domain's images from the other's."""
        a, b = DOMAINS
        return {a: self.generators[a](images[b]), b: self.generators[b](images[a])}

    def judge(self, domain: str, real: Tensor, made: Tensor) -> Tensor:
        """The loss of a domain's discriminator, on real images and on images made now or earlier."""
        network = self.discriminators[domain]
        return discriminator_loss(network(real), network(self.pools[domain].swap(made.detach())))

    def generate(self, batch: tuple[Tensor, Tensor]) -> Images:
        """A, what is made of it, and B: the truth where there is one, else any image of that domain."""
        a, b = batch
        return Images(a, self.generators["B"](a), b)

    def bring_back(self, images: Tensor) -> Tensor:
        """Images of A that were translated, as images of A again."""
        again: Tensor = self.generators["A"](images.to(self.dtype))  # callbacks are not in the autocast of the step
        return again

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """The method's optimizer for both generators, the original's Adam for both discriminators."""
        optimizers = [
            self.method.configure(self.generators.named_parameters("generators"), self.lr, betas=self.betas),
            Adam(self.discriminators.parameters(), lr=self.lr, betas=BETAS),
        ]
        if self.epochs is None:
            return optimizers, []
        return optimizers, [linear_decay(optimizer, self.epochs) for optimizer in optimizers]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the image pools: a resumed run goes on with the same. Of several processes, the first one's."""
        checkpoint["pools"] = {domain: pool.images for domain, pool in self.pools.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the image pools."""
        for domain, images in checkpoint["pools"].items():
            self.pools[domain].images = images
