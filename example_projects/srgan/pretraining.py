"""Before any method's turn: the generator is trained on the squared error alone, once for all runs of a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from example_projects.common.image_module import ImageModule, Images, linear_decay
from example_projects.common.image_project import ImageProject, Job, train
from example_projects.common.methods import Method
from example_projects.common.runs import Result
from example_projects.srgan.module import BETAS, enlarged
from example_projects.srgan.networks import Generator

NAME = "pretrained"
SEED = 0  # whatever the seeds of the runs are: they all begin with the same generator


class Pretraining(ImageModule):
    """Trains SRGAN's generator, SRResNet, on "mse" alone by Adam.

    Args:
        lr: learning rate, which falls to zero in the second half.
        epochs: of the whole training.
        width: channels of the generator's first convolution.
        blocks: of the generator.
    """

    def __init__(self, lr: float, *, epochs: int, width: int, blocks: int) -> None:
        super().__init__(Method(Adam), {"mse": 1.0}, lr)
        self.epochs, self.generator = epochs, Generator(width, blocks)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One step of the generator."""
        low, truth = batch
        self.update({"mse": F.mse_loss(self.generator(low), truth)}, self.optimizers())

    def generate(self, batch: tuple[Tensor, Tensor]) -> Images:
        """Enlarge."""
        return enlarged(self.generator, batch)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """Adam."""
        optimizer = self.method.configure(self.generator.named_parameters("generator"), self.lr, BETAS)
        return [optimizer], [linear_decay(optimizer, self.epochs)]


def folder_of(options: argparse.Namespace) -> Path:
    """Where the pretraining is kept."""
    return Path(options.output_dir) / NAME


def pretrain(project: ImageProject, options: argparse.Namespace) -> Result:
    """Train the generator, or continue, or read the result of a pretraining that has ended.

    Returns:
        Its row of the table.
    """
    own = argparse.Namespace(**vars(options))
    own.max_epochs, own.metrics_every = options.pretrain_epochs, options.pretrain_epochs + 1  # measured at its end

    def module_of(options: argparse.Namespace, method: Method, lambdas: Mapping[str, float], lr: float) -> Pretraining:
        return Pretraining(lr, epochs=options.max_epochs, width=options.width, blocks=options.blocks)

    job = Job(NAME, Method(Adam), {"mse": 1.0}, options.pretrain_lr, SEED)
    from_nothing = replace(project, make_module=module_of, begin=lambda module, options: None)
    result = train(from_nothing, own, job, folder=folder_of(options))
    return {"method": NAME, "seed": SEED, "folder": NAME, **result}


def load_pretrained(generator: nn.Module, options: argparse.Namespace) -> None:
    """Give a generator the weights that :func:`pretrain` ended with."""
    checkpoint = torch.load(folder_of(options) / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=False)
    prefix = "generator."
    generator.load_state_dict({key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items()})
