"""What a trial keeps of the reports that are made while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from time import process_time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtadam.balancer_slot import balancer_of, mtadam_of
from lightning_mtadam.balancers import GradientBalancer
from lightning_mtadam.balancers.balancer import parameters_in
from lightning_mtadam.callbacks import GradientReport
from lightning_mtadam.callbacks.gradient_summary import GradientSummary
from lightning_mtadam.diagnosis.advice import EVERY, Course
from lightning_mtadam.meetings import compare, norms_where_met

FIRST = 2
"""So many steps are slow, and not timed."""


class Watch(pl.Callback):
    """Keeps all reports of a :class:`~lightning_mtadam.callbacks.GradientReport`, with losses and the time of steps.

    Args:
        report: comes before this among the trainer's callbacks; its layers are single parameters.

    Attributes:
        found: the reports.
    """

    def __init__(self, report: GradientReport) -> None:
        self.report = report
        self.found: list[GradientSummary] = []
        self._losses: list[Mapping[str, Any]] = []
        self._began = 0.0
        self._seconds: dict[bool, list[float]] = {False: [], True: []}  # of batches, and of those with a report
        self._timed = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the optimizer trains this module, and see whether times can be compared."""
        own = {id(parameter) for parameter in pl_module.parameters()}
        optimizer = trainer.optimizers[0]
        if any(id(parameter) not in own for parameter in parameters_in(optimizer)):
            raise ValueError(
                "configure_optimizers returned an optimizer of parameters that are not the copy's: it was made before"
                " the module was copied. Make it in configure_optimizers, of self.parameters()."
            )
        balances = mtadam_of(optimizer) is not None or isinstance(balancer_of(pl_module), GradientBalancer)
        self._timed = pl_module.device.type == "cpu" and trainer.accumulate_grad_batches == 1 and not balances

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Begin to count the time."""
        self._began = process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep what is new."""
        seconds, latest = process_time() - self._began, self.report.latest
        new = latest is not (self.found[-1] if self.found else None)
        if trainer.global_step > FIRST:
            self._seconds[new].append(seconds)
        if new and latest is not None:
            self.found.append(latest)
            self._losses.append(dict(outputs) if isinstance(outputs, Mapping) else {})

    def course(self) -> Course:
        """What was measured, in tables."""
        terms = tuple(dict.fromkeys(term for report in self.found for term in report.terms))
        losses = [[float(row.get(term, torch.nan)) for term in terms] for row in self._losses]
        return Course(
            terms,
            tuple(report.step for report in self.found),
            _table(losses),
            _table([[report.norms.get(term, 0.0) for term in terms] for report in self.found]),
            torch.stack([compared_where_met(_by_parameter(report, terms)) for report in self.found]),
            _table([[_row(report.cosines.get(term, {}), terms) for term in terms] for report in self.found]),
        )

    def costs(self) -> dict[str, float]:
        """The time of a step over that of one on the sum, by way to train; estimated from what reports have added.

        Empty where that says nothing: the gradients of terms are taken anyway, or the host does not wait for them.
        """
        if not self._timed or not all(self._seconds.values()):
            return {}
        plain, reported = (median(self._seconds[new]) for new in (False, True))
        terms = max(len(report.terms) for report in self.found)
        pass_of_term = min(1.0, max(0.0, reported / plain - 1) / terms)  # a report takes one for each; none is a step
        more = (terms - 1) * pass_of_term
        return {"MTAdam at every step": 1 + more, f"MTAdam with balance_every={EVERY}": 1 + more / EVERY}


def compared_where_met(norms: Tensor) -> Tensor:
    """The logarithm of each term's norm over each other's, on the parameters that both reach: [P, I] -> [I, I].

    Args:
        norms: of the terms' gradients at each parameter.

    Example:
        >>> compared_where_met(torch.tensor([[3.0, 1.0], [4.0, 0.0]])).exp()[0, 1].round(decimals=4).item()
        3.0
    """
    whole = norms.norm(dim=0, keepdim=True)  # the network is one layer
    shares = torch.where(whole > 0, (norms / whole).square(), 0)
    return compare(norms_where_met(whole, shares, torch.zeros(len(norms), dtype=torch.long, device="cpu")))[0]


def _by_parameter(report: GradientSummary, terms: tuple[str, ...]) -> Tensor:
    """The norms at each parameter: [P, I]."""
    return _table([[one.norms.get(term, 0.0) for term in terms] for one in report.layers.values()])


def _row(cosines: Mapping[str, float], terms: tuple[str, ...]) -> list[float]:
    return [cosines.get(term, float("nan")) for term in terms]


def _table(rows: list[Any]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu")
