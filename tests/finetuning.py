"""A network of which a part is frozen in the beginning, and what unfreezes it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mtadam import MTAdam
from tests.lightning_models import LR, Batch, StepwiseRegression


def two_losses(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Terms that reach the head also while the backbone is frozen."""
    x, y = batch
    output = network(x)
    return {"fit": (output - y).square().mean(), "size": 300 * output.abs().mean()}


def finetuning_optimizer(network: nn.Module, *, named: bool = True, **options: Any) -> MTAdam:
    """Of what is not frozen."""
    trained = [(name, one) for name, one in network.named_parameters() if one.requires_grad]
    return MTAdam(trained if named else [one for _, one in trained], lr=LR, **options)


class Finetuned(StepwiseRegression):
    """Its backbone, the first layer, is frozen in the beginning."""

    def __init__(self, *, named: bool = True, **options: Any) -> None:
        super().__init__(lambda network: finetuning_optimizer(network, named=named, **options))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return two_losses(self.network, self.batches[self.trainer.global_step % len(self.batches)])

    @property
    def backbone(self) -> nn.Module:
        return self.network[0]


class Finetuning(BaseFinetuning):
    """Unfreezes the backbone in the second epoch, or when it goes on from there: Lightning leaves that to the user."""

    def freeze_before_training(self, pl_module: Finetuned) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Finetuned, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Finetuned) -> None:
        super().on_fit_start(trainer, pl_module)
        if len(trainer.optimizers[0].param_groups) > 1:
            self.make_trainable(pl_module.backbone)
