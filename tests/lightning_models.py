"""Toy modules, their data, a quiet trainer, and what they are compared by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mtadam import MTAdam, MultiTermLightningModule

Batch = Sequence[Tensor]
BATCH_SIZE = 4
LR = 1e-2

QUIET = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*log_every_n_steps"
)
"""Without Lightning's remarks on small runs."""

needs_exact_resume = pytest.mark.skipif(
    not RequirementCache("lightning>=2.5"),
    reason="Lightning before 2.5 trains a batch twice when it resumes within an epoch, with any optimizer",
)


def make_loader(batches: int = 6, dtype: torch.dtype = torch.float64, seed: int = 1) -> DataLoader:
    """Always the same batches of (x [4, 3], y [4, 2]) in the same order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * BATCH_SIZE, 3, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.stack([x.sum(1).sin(), x.prod(1)], dim=1)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZE, shuffle=False)


def make_network(dtype: torch.dtype = torch.float64, seed: int = 0, *, batch_norm: bool = False) -> nn.Sequential:
    """Two layers, the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(5)] if batch_norm else []
        return nn.Sequential(nn.Linear(3, 5), *middle, nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def three_losses(network: nn.Sequential, batch: Batch, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Terms of very different size; "decay" reaches only the first layer's weight. ``model``: a wrapped network."""
    x, y = batch
    output = (model or network)(x)
    return {
        "fit": (output - y).square().mean(),
        "size": 300 * output.abs().mean(),
        "decay": 1e-2 * network[0].weight.square().sum(),
    }


def make_mtadam(network: nn.Module, **options: Any) -> MTAdam:
    return MTAdam(network.named_parameters(), **{"lr": LR, **options})


def adam(network: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=LR)


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)


class Regression(MultiTermLightningModule):
    """Returns ``three_losses``.

    Args:
        make_optimizer: makes the optimizer from the network.
        make_schedule: makes from the optimizer what Lightning calls ``lr_scheduler``.
        dtype: of the network.
        batch_norm: whether the network has a BatchNorm.
    """

    def __init__(
        self,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = make_mtadam,
        make_schedule: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
        dtype: torch.dtype = torch.float64,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.network = make_network(dtype, batch_norm=batch_norm)
        self.make_optimizer, self.make_schedule = make_optimizer, make_schedule

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return three_losses(self.network, batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.network)
        if self.make_schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_schedule(optimizer)}


class StepwiseRegression(Regression):
    """Its batches depend on the number of the step only, so that a resumed run sees the same ones."""

    batches = list(make_loader(7, seed=9))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        x, y = self.batches[self.trainer.global_step % len(self.batches)]
        dtype = self.network[0].weight.dtype
        return three_losses(self.network, (x.to(dtype), y.to(dtype)))


class SumRegression(pl.LightningModule):
    """What ``Regression`` is to an ordinary LightningModule: the plain sum of the terms."""

    def __init__(self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.network = make_network()
        self.make_optimizer = make_optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return total(three_losses(self.network, batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.network)


def make_gan_parts(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        generator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        discriminator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    return generator, discriminator


def generator_losses(generator: nn.Module, discriminator: nn.Module, batch: Batch) -> dict[str, Tensor]:
    x, y = batch
    fake = generator(x)
    return {"l1": (fake - y).abs().mean(), "gan": nn.functional.softplus(-discriminator(fake)).mean()}


def discriminator_losses(generator: nn.Module, discriminator: nn.Module, batch: Batch) -> dict[str, Tensor]:
    x, y = batch
    return {
        "real": nn.functional.softplus(-discriminator(y)).mean(),
        "fake": nn.functional.softplus(discriminator(generator(x).detach())).mean(),
    }


class GAN(MultiTermLightningModule):
    """Manual optimization with one optimizer for each network.

    Args:
        make_optimizer: makes an optimizer from a network.
        dtype: of the networks.
        toggle: whether only the parameters of the optimizer in use require gradients.
    """

    def __init__(
        self,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = make_mtadam,
        dtype: torch.dtype = torch.float64,
        toggle: bool = False,
    ) -> None:
        super().__init__()
        self.toggle = toggle
        self.automatic_optimization = False
        self.generator, self.discriminator = make_gan_parts(dtype)
        self.make_optimizer = make_optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for optimizer, losses in zip(self.optimizers(), (generator_losses, discriminator_losses), strict=True):
            with optimizer.toggle_model() if self.toggle else nullcontext():
                optimizer.zero_grad()
                self.backward_terms(losses(self.generator, self.discriminator, batch), optimizer)
                self.after_backward(optimizer)
                optimizer.step()

    def after_backward(self, optimizer: torch.optim.Optimizer) -> None:
        """For tests that look at, or change, the gradients."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.make_optimizer(self.generator), self.make_optimizer(self.discriminator)]


def make_trainer(**options: Any) -> pl.Trainer:
    """A trainer on the CPU that prints nothing and writes nothing."""
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"),
        False,
    )
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 2, **quiet, **options})


def fit(module: pl.LightningModule, data: DataLoader, **trainer_options: Any) -> pl.Trainer:
    """Fit with a quiet trainer, two epochs by default."""
    trainer = make_trainer(**trainer_options)
    trainer.fit(module, data)
    return trainer


def half_precision(init_scale: float, **options: Any) -> MixedPrecision:
    """float16 with a gradient scaler on the CPU, where ``precision="16-mixed"`` would fall back to bfloat16."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init_scale, **options))


class MemoryLogger(Logger):
    """Keeps what is logged, by step. It knows nothing of TensorBoard."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They do not matter here."""


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """The largest difference between two networks' parameters; nan counts as a difference."""
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    return max(float((a.detach() - b.detach()).abs().nan_to_num(nan=torch.inf).max()) for a, b in pairs)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """Fail unless all parameters are equal bit for bit."""
    for (name, a), (other, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), f"{name} differs by up to {float((a - b).detach().abs().max())}"


def assert_same_state(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
    """Fail unless the optimizers hold the same numbers bit for bit."""
    one, two = first.state_dict(), second.state_dict()
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    assert one["state"], "there is no state to compare"
    for index, state in one["state"].items():
        assert state.keys() == two["state"][index].keys()
        for key, value in state.items():
            assert torch.equal(value, two["state"][index][key]), f"{key} of parameter {index} differs"


def assert_same_balance_weights(first: MTAdam, second: MTAdam) -> None:
    """Fail unless the balance weights of all layers are equal bit for bit, or both nan."""
    weights, others = first.balance_weights(), second.balance_weights()
    assert weights.keys() == others.keys()
    for layer, values in weights.items():
        torch.testing.assert_close(values, others[layer], rtol=0, atol=0, equal_nan=True)
