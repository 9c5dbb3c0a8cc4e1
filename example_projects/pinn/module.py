"""The LightningModule: a term for the equation and a term for the boundary."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from example_projects.pinn.methods import Method
from example_projects.pinn.network import Net
from example_projects.pinn.problem import pinn_losses, relative_error
from lightning_mtadam import MultiTermLightningModule


class Equation(MultiTermLightningModule):
    """Solves the equation.

    Args:
        method: how to train.
        factor: what the boundary loss is multiplied by, as a change of units would; no method is told.
        lr: learning rate.
    """

    def __init__(self, method: Method, factor: float, lr: float) -> None:
        super().__init__()
        self.network = Net()
        self.method, self.factor, self.lr = method, factor, lr

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the two losses."""
        x = batch.detach().requires_grad_()
        losses = pinn_losses(self.network(x), x)
        return {**losses, "boundary": self.method.boundary_weight * self.factor * losses["boundary"]}

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Compare with the exact solution."""
        self.log("test/relative_error", relative_error(self.network(batch), batch))

    def configure_optimizers(self) -> Optimizer:
        """The method's optimizer."""
        return self.method.configure(self.network, self.lr)
