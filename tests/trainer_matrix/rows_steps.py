"""What else users have around a step: closures, absent terms, graphs that are shared, logs of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mtadam import MultiTermLightningModule
from lightning_mtadam.balancers import Balancer, FixedWeights, MetaBalance
from tests.lightning_models import (
    Regression,
    assert_same,
    fit,
    largest_difference,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
)
from tests.loops import backward, hand_loop, take_step
from tests.trainer_matrix.table import ADAM, HAND_LOOP, REFUSED, row

GROUP = "Around a step"
WEIGHTS = {"a": 1.0, "b": 100.0}


def two_losses(w: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"a": (w[0] - 1) ** 2 + w[0] ** 4, "b": (w[0] + w[1] + 1) ** 4}


def lbfgs(parameters: Any) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe")


class Quartic(MultiTermLightningModule):
    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.w, self.balancer = nn.Parameter(torch.tensor([3.0, 3.0])), balancer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return two_losses(self.w)

    def configure_optimizers(self) -> Any:
        return lbfgs([self.w])


@row(GROUP, "LBFGS with a line search, with balancers that have an objective", HAND_LOOP)
def lbfgs_gets_the_value_that_its_gradient_belongs_to(folder: Path) -> None:
    module, w = Quartic(FixedWeights(WEIGHTS)), nn.Parameter(torch.tensor([3.0, 3.0]))
    fit(module, make_loader(5), max_epochs=1)
    optimizer = lbfgs([w])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = sum((WEIGHTS[name] * loss for name, loss in two_losses(w).items()), torch.zeros(()))
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    torch.testing.assert_close(module.w, w)
    assert closure().item() == pytest.approx(0.289, abs=1e-3)


@row("Refused", "LBFGS with MTAdam, or with a balancer whose gradient belongs to no value", REFUSED)
def lbfgs_without_an_objective_is_refused(folder: Path) -> None:
    module = Quartic(MetaBalance())
    with pytest.raises(ValueError, match="MetaBalance cannot be used with LBFGS"):
        fit(module, make_loader(5), max_epochs=1)
    assert module.w.tolist() == [3.0, 3.0]


@row(GROUP, "a term that is a constant zero, `torch.zeros(())`, or left out", HAND_LOOP, cases=["zero", "left out"])
def a_constant_zero_is_absent(folder: Path, kind: str) -> None:
    def absent(losses: dict[str, Any], step: int) -> dict[str, Any]:
        if step % 3 == 1:
            losses["size"] = torch.zeros(())
            if kind == "left out":
                del losses["size"]
        return losses

    class Sometimes(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return absent(three_losses(self.network, batch), batch_idx)

    module, network = Sometimes(), make_network()
    fit(module, make_loader(), max_epochs=1)
    optimizer = make_mtadam(network)
    for index, batch in enumerate(make_loader()):
        losses = three_losses(network, batch)
        take_step(optimizer, {name: loss for name, loss in losses.items() if name != "size" or index % 3 != 1})
    assert_same(module.network, network)


@row(GROUP, "several optimizers on one graph, `retain_graph=True`", HAND_LOOP)
def two_optimizers_share_a_graph(folder: Path) -> None:
    class Shared(Regression):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            losses = three_losses(self.network, batch)
            del losses["decay"]
            first, second = self.optimizers()
            for optimizer, kept in ((first, True), (second, False)):
                optimizer.zero_grad()
                self.backward_terms(losses, optimizer, retain_graph=kept)
            first.step()
            second.step()

        def configure_optimizers(self) -> Any:
            return [make_mtadam(self.network[0]), make_mtadam(self.network[-1])]

    module, network = Shared(), make_network()
    fit(module, make_loader(), max_epochs=1)
    optimizers = [make_mtadam(network[0]), make_mtadam(network[-1])]
    for batch in make_loader():
        for optimizer in optimizers:  # on a graph each
            optimizer.zero_grad()
            losses = three_losses(network, batch)
            backward(optimizer, {name: losses[name] for name in ("fit", "size")})
        for optimizer in optimizers:
            optimizer.step()
    assert_same(module.network, network)


@row(GROUP, "your own `self.log('train/loss', ...)`", ADAM)
def ones_own_log_stands(folder: Path) -> None:
    class Logging(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train/loss", 7.0, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = fit(Logging(), make_loader())
    assert {name: float(trainer.callback_metrics[name]) for name in ("train/loss", "train/loss_epoch")} == {
        "train/loss": 7.0,
        "train/loss_epoch": 7.0,
    }
    assert "train/fit" in trainer.callback_metrics


@row(GROUP, "losses in any mapping", HAND_LOOP)
def a_mapping_of_another_kind(folder: Path) -> None:
    class Unsure(dict[str, Any]):
        def __bool__(self) -> bool:
            raise RuntimeError("ask for its length")  # as a TensorDict does

    class Mapped(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Unsure(three_losses(self.network, batch))

    module, network = Mapped(), make_network()
    fit(module, make_loader(), max_epochs=1)
    hand_loop(network, make_mtadam(network), make_loader(), epochs=1)
    assert_same(module.network, network)
    assert largest_difference(network, make_network()) > 0
