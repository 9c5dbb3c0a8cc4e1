"""Every balancer, with losses to balance; each test of what they have in common runs for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtadam import MultiTermLightningModule
from lightning_mtadam.balancers import (
    Balancer,
    FixedWeights,
    GradNorm,
    MetaBalance,
    OutputBalancer,
    ScalarizerBalancer,
    SharedLayerBalancer,
    TorchJDBalancer,
    UncertaintyWeighting,
)
from tests.lightning_models import LR, Batch, make_loader, make_network, make_trainer, three_losses
from tests.loops import clip_by_hand

Losses = dict[str, Tensor]
TERMS = ("fit", "size", "decay")


@dataclass(frozen=True)
class Case:
    """A balancer and what it is tried on.

    Attributes:
        make: makes the balancer, for a module with the layers "network.0" and "network.2".
        losses: of a network and a batch.
        joins: whether accumulated batches count as one joined batch.
    """

    make: Callable[[], Balancer]
    losses: Callable[[nn.Module, Batch], Losses] = three_losses
    joins: bool = True


def output_losses(network: nn.Module, batch: Batch) -> Losses:
    """Terms of very different size, of the network's output alone."""
    x, y = batch
    output = network(x)
    return {
        "fit": (output - y).square().mean(),
        "size": 300 * output.abs().mean(),
        "bend": 1e-3 * output.pow(4).mean(),
    }


def uncertainty(terms: Iterable[str] | None = None) -> Balancer:
    balancer = UncertaintyWeighting(terms)
    balancer.learned.double()  # as the network
    return balancer


def scalarizer_that_learns(scalarizer: nn.Module) -> Balancer:
    return ScalarizerBalancer(scalarizer.double(), terms=TERMS)  # as the network


CASES = {
    "fixed": Case(lambda: FixedWeights({"fit": 1.0, "size": 0.01, "decay": 3.0})),
    "gradnorm": Case(lambda: GradNorm(shared="network.0")),
    "gradnorm, three steps of start": Case(lambda: GradNorm("network.0.weight", alpha=0.5, initial_losses=3)),
    "uncertainty": Case(uncertainty),
    "uncertainty, terms given": Case(lambda: uncertainty(TERMS)),
    "output": Case(lambda: OutputBalancer("network"), output_losses, joins=False),
    "output, weighted": Case(
        lambda: OutputBalancer("network.2", {"fit": 5.0, "size": 1.0, "bend": 2.0}, ema_decay=0.5),
        output_losses,
        joins=False,
    ),
    "metabalance": Case(MetaBalance),
    "shared layer": Case(lambda: SharedLayerBalancer("network.0"), joins=False),
    "shared layer, at its output": Case(
        lambda: SharedLayerBalancer("network.0", "mean", {"size": 0.1}, decay=0.0, limit=30.0, at="output"), joins=False
    ),
}
if find_spec("torchjd"):  # a machine with a GPU may have nothing but torch and Lightning
    from torchjd.aggregation import GradVac, PCGrad, UPGrad
    from torchjd.scalarization import FAMO, IMTLL, STCH, GeometricMean, Random

    CASES["torchjd, random"] = Case(lambda: TorchJDBalancer(PCGrad()))
    CASES["torchjd, weights of a solver"] = Case(lambda: TorchJDBalancer(UPGrad()))
    CASES["torchjd, with a state"] = Case(lambda: TorchJDBalancer(GradVac(), seed=3))
    CASES["torchjd, FAMO"] = Case(lambda: ScalarizerBalancer(FAMO(3), terms=TERMS), joins=False)
    CASES["torchjd, IMTL-L"] = Case(lambda: scalarizer_that_learns(IMTLL(3)))
    CASES["torchjd, STCH"] = Case(lambda: ScalarizerBalancer(STCH(0.5)), joins=False)
    CASES["torchjd, geometric mean"] = Case(lambda: ScalarizerBalancer(GeometricMean()), joins=False)
    CASES["torchjd, random weights"] = Case(lambda: ScalarizerBalancer(Random(), seed=3))


class Balanced(MultiTermLightningModule):
    """Returns the losses of a case."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.case, self.network = case, make_network(dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Losses:
        return self.case.losses(self.network, batch)

    def configure_balancer(self) -> Balancer:
        return self.case.make()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=LR)


def fit_from(module: MultiTermLightningModule, checkpoint: Path, **options: Any) -> None:
    """Go on from a checkpoint."""
    make_trainer(**options).fit(module, make_loader(), ckpt_path=checkpoint)


def balanced_by_hand(
    case: Case,
    batches: Iterable[Batch],
    *,
    epochs: int = 1,
    accumulate: int = 1,
    clip: tuple[float, str] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Balanced:
    """What the plain loop arrives at, without Lightning."""
    module = Balanced(case, dtype)
    balancer, optimizer = module.balancer, module.configure_optimizers()
    balancer.attach(module)
    for index, batch in enumerate(list(batches) * epochs):
        if index % accumulate == 0:
            optimizer.zero_grad()
        share = torch.tensor(1 / accumulate, dtype=dtype)
        balancer.backward(case.losses(module.network, batch), optimizer, model=module, grad_output=share)
        if (index + 1) % accumulate == 0:
            if clip is not None:
                clip_by_hand(optimizer, *clip)
            optimizer.step()
    return module
