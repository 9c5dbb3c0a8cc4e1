"""The LightningModule: one loss term per class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from example_projects.common.methods import Method
from example_projects.mnist.network import Net
from lightning_mtadam import MTAdam, MultiTermLightningModule, partitioned_losses

CLASSES = 10
TERMS = tuple(f"class_{index}" for index in range(CLASSES))


def class_losses(log_probabilities: Tensor, target: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Per class: its weight times the sum of its samples' negative log-likelihood, over the batch size.

    A class without samples gives 0. (``nll_loss(weight=...)`` with its mean reduction would divide each class by its
    own weight, so that the weights cancel, and give nan for an absent class.)

    Args:
        log_probabilities: [B, 10].
        target: [B], int64.
        weights: [10].

    Example:
        >>> losses = class_losses(torch.full((2, 10), 0.1).log(), torch.tensor([3, 3]), torch.arange(10.0))
        >>> round(losses["class_3"].item(), 3), losses["class_4"].item()
        (6.908, 0.0)
    """
    nll = F.nll_loss(log_probabilities, target, reduction="none")
    sums = torch.zeros_like(weights).index_add(0, target, nll) * weights / len(target)
    return dict(zip(TERMS, sums.unbind(), strict=True))


class ClassTerms(MultiTermLightningModule):
    """Classifies digits, with one weighted loss per class.

    Args:
        method: how to train.
        weights: one per class.
        lr: learning rate.
        whole_channels: the first dropout drops whole channels.
    """

    def __init__(self, method: Method, weights: Tensor, lr: float, *, whole_channels: bool = False) -> None:
        super().__init__()
        self.network = Net()
        if whole_channels:
            self.network.dropout1 = nn.Dropout2d(self.network.dropout1.p)
        self.method, self.lr = method, lr
        self.register_buffer("weights", weights)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.class_accuracy = MulticlassAccuracy(CLASSES, average="none")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the ten losses; for MTAdam each of a pass of its own, which costs it one pass over the rows in all."""
        images, target = batch
        if self.method.optimizer is MTAdam:
            return partitioned_losses(self.losses_of_rows, batch, target, TERMS)
        return class_losses(self.network(images), target, self.weights)

    def losses_of_rows(self, images: Tensor, target: Tensor) -> Tensor:
        """The weighted negative log-likelihood of each row, [B]."""
        return self.weights[target] * F.nll_loss(self.network(images), target, reduction="none")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count."""
        images, target = batch
        prediction = self.network(images)
        self.accuracy(prediction, target)
        self.class_accuracy(prediction, target)

    def on_test_epoch_end(self) -> None:
        """Report percentages."""
        self.log("test/accuracy", 100 * self.accuracy.compute(), sync_dist=True)
        self.log("test/worst_class", 100 * self.class_accuracy.compute().min(), sync_dist=True)

    def configure_optimizers(self) -> Optimizer:
        """The method's optimizer."""
        return self.method.configure(self.network.named_parameters(), self.lr, terms=TERMS)
