"""Logs the balance weights n_i / n_anchor of every layer and term, or a weight per term."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_mtadam import lightning_internals
from lightning_mtadam.balancer_slot import balancer_of, mtadam_of
from lightning_mtadam.callbacks import tensorboard
from lightning_mtadam.terms import BalancesTerms

NOTHING: tuple[dict[str, tuple[str, ...]], bool] = ({}, False)
"""The layout of charts before there are any."""

SUMMARY_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


class BalanceWeightMonitor(pl.Callback):
    """Log the balance weights of MTAdam, or what a balancer multiplies the losses by, to every logger of the trainer.

    Per layer and term the scalar ``balance_weight.<term>/<layer>``; per term the median and the 10th and 90th
    percentile over the layers, ``balance_weight/<term>.median``, ``.p10``, ``.p90``. To a TensorBoard logger also a
    heatmap of layers by terms (Images), and a chart per term of the median between its percentiles (Custom Scalars).
    A layer that a term never reached has no value. Between logging steps it costs nothing. A balancer that has one
    weight per term is logged as ``term_weight/<term>``, with one chart of all of them; ``MetaBalance`` is logged as
    MTAdam is.

    With several optimizers the first part of a tag tells them apart, as in
    :class:`~lightning.pytorch.callbacks.LearningRateMonitor`: ``balance_weight-MTAdam``, ``balance_weight-MTAdam-1``.

    Args:
        logging_interval: "step" and ``None`` log every ``log_every_n_steps`` of the trainer, "epoch" at the end of
            every epoch.
        max_series: with more series (layers times terms) than this, only the summaries are logged.
        image_every_n: a heatmap is written at the first logging step, and then every so many; 0 writes none.

    Raises:
        MisconfigurationException: an unknown interval; a trainer without a logger or without MTAdam.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_mtadam.callbacks import BalanceWeightMonitor
        >>> trainer = Trainer(callbacks=[BalanceWeightMonitor()], accelerator="cpu")
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        *,
        max_series: int = 300,
        image_every_n: int = 10,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException("logging_interval should be `step` or `epoch` or `None`.")
        self.logging_interval = logging_interval
        self.max_series = max_series
        self.image_every_n = image_every_n
        self._logged = 0
        self._told: set[str] = set()
        self._laid_out = NOTHING

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is something to log, and something to log it to."""
        self._laid_out = NOTHING
        if not trainer.loggers:
            raise MisconfigurationException("Cannot use `BalanceWeightMonitor` with a `Trainer` that has no logger.")
        if not any(True for _ in named_sources(trainer)):
            names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise MisconfigurationException(
                f"`BalanceWeightMonitor` needs an MTAdam optimizer, but `configure_optimizers` returned {names}."
                " Return MTAdam(self.named_parameters()), or leave the callback out. A balancer that"
                " `configure_balancer` returns will do as well."
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Log after an optimizer step."""
        if self.logging_interval != "epoch" and lightning_internals.should_log(trainer):
            self._log(trainer, lightning_internals.logging_step(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log at the end of an epoch."""
        if self.logging_interval == "epoch":
            self._log(trainer, lightning_internals.logging_step(trainer) - 1)

    def state_dict(self) -> dict[str, Any]:
        """How often it has logged, so that heatmaps go on in their rhythm."""
        return {"logged": self._logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self._logged = state_dict["logged"]

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        metrics: dict[str, float] = {}
        term_weights: dict[str, float] = {}
        terms_of: dict[str, tuple[str, ...]] = {}
        image_due = self.image_every_n > 0 and self._logged % self.image_every_n == 0
        for prefix, source in named_sources(trainer):
            found = source.term_weights()
            term_weights |= {f"{tensorboard.TERM_WEIGHT}/{term}": float(weight) for term, weight in found.items()}
            weights = source.balance_weights()
            if not weights:
                continue
            terms_of[prefix] = source.terms
            table = torch.stack(list(weights.values())).cpu()
            metrics |= summaries(prefix, source.terms, table)
            metrics |= self._series(prefix, source.terms, list(weights), table)
            for writer in tensorboard.writers(trainer.loggers):
                if image_due and table.numel() <= self.max_series:
                    tensorboard.add_heatmap(writer, prefix, source.terms, list(weights), table, step)
        weighted = bool(term_weights)
        if (terms_of, weighted) != self._laid_out:
            for writer in tensorboard.writers(trainer.loggers):
                tensorboard.add_layout(writer, terms_of, weighted=weighted)
            self._laid_out = terms_of, weighted
        metrics |= term_weights
        if metrics:
            self._logged += 1
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def _series(self, prefix: str, terms: tuple[str, ...], layers: list[str], table: Tensor) -> dict[str, float]:
        if table.numel() > self.max_series:
            if prefix not in self._told:
                rank_zero_info(
                    f"BalanceWeightMonitor: {table.numel()} series (layers times terms) are more than max_series="
                    f"{self.max_series}; only the summaries over the layers are logged. Raise max_series, or balance"
                    " larger units with MTAdam(..., layers='module')."
                )
                self._told.add(prefix)
            return {}
        return {
            f"{prefix}.{term}/{layer}": value
            for layer, row in zip(layers, table.tolist(), strict=True)
            for term, value in zip(terms, row, strict=True)
            if math.isfinite(value)  # nan: the term never reached the layer; inf: the anchor's norm is next to nothing
        }


def summaries(prefix: str, terms: tuple[str, ...], table: Tensor) -> dict[str, float]:
    """The median and two percentiles over the layers that a term reaches, per term. ``table`` is [L, I]."""
    found: dict[str, float] = {}
    for term, column in zip(terms, table.T, strict=True):
        reached = column[column.isfinite()]
        if len(reached):
            levels = torch.tensor(list(SUMMARY_QUANTILES.values()), dtype=reached.dtype, device=reached.device)
            values = torch.quantile(reached, levels).tolist()
            found |= {f"{prefix}/{term}.{name}": v for name, v in zip(SUMMARY_QUANTILES, values, strict=True)}
    return found


def named_sources(trainer: pl.Trainer) -> Iterator[tuple[str, BalancesTerms]]:
    """What balances losses in a trainer, each with the first part of its tags."""
    balancer = balancer_of(trainer.lightning_module)
    if balancer is not None:
        yield "balance_weight", balancer
        return
    yield from named_optimizers(trainer.optimizers)


def named_optimizers(optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, BalancesTerms]]:
    """The MTAdams of a trainer, each with the first part of its tags."""
    held = [mtadam_of(optimizer) or optimizer for optimizer in optimizers]
    found = [optimizer for optimizer in held if isinstance(optimizer, BalancesTerms)]
    for index, optimizer in enumerate(found):
        name = type(optimizer).__name__ + (f"-{index}" if index else "")
        yield "balance_weight" if len(found) == 1 else f"balance_weight-{name}", optimizer
