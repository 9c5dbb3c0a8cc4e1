"""The LightningModule: a squared error per task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from example_projects.toy.methods import Method, terms_of
from example_projects.toy.network import Net
from lightning_mtadam import MultiTermLightningModule
from lightning_mtadam.balancers import Balancer

Batch = tuple[Tensor, Tensor]


def task_losses(predicted: Iterable[Tensor], wanted: Tensor) -> list[Tensor]:
    """The mean squared error of each task. T times [N, 100], [T, N, 100] -> T scalars."""
    return [F.mse_loss(one, other) for one, other in zip(predicted, wanted, strict=True)]


def normalised_loss(predicted: Iterable[Tensor], wanted: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The sum over the tasks of ``L_i / sigma_i^2``; somewhat below T for a network that says 0. Scalar."""
    losses = torch.stack(task_losses(predicted, wanted))
    return (losses / losses.new_tensor(sigmas).square()).sum()


class Toy(MultiTermLightningModule):
    """Learns the tasks.

    Args:
        method: how to train.
        sigmas: scales of the tasks.
        lr: learning rate.
    """

    log_terms = False

    def __init__(self, method: Method, sigmas: Sequence[float], lr: float) -> None:
        super().__init__()
        self.network = Net(len(sigmas))
        self.method, self.sigmas, self.lr = method, sigmas, lr

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return a loss per task."""
        x, wanted = batch
        return dict(zip(terms_of(len(self.sigmas)), task_losses(self.network(x), wanted), strict=True))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """A point of the curve."""
        self._log_loss("validation", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The figure of the table."""
        self._log_loss("test", batch)

    def _log_loss(self, stage: str, batch: Batch) -> None:
        x, wanted = batch
        loss = normalised_loss(self.network(x), wanted, self.sigmas)
        self.log(f"{stage}/normalised_loss", loss, batch_size=len(x))

    def configure_balancer(self) -> Balancer | None:
        """The method's balancer."""
        return None if self.method.balancer is None else self.method.balancer(self.sigmas)

    def configure_optimizers(self) -> Optimizer:
        """The method's optimizer."""
        return self.method.configure(self.network, self.lr)
