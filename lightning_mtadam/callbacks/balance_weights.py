"""Logs the balance weights n_i / n_anchor of every term, or what multiplies its loss, and draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_mtadam import lightning_internals
from lightning_mtadam.callbacks import tags, tensorboard
from lightning_mtadam.callbacks.balance_pictures import layers_by_terms, terms_over_steps
from lightning_mtadam.callbacks.history import History
from lightning_mtadam.callbacks.readings import Reading, named_sources, readings
from lightning_mtadam.callbacks.tags import TERM_WEIGHT

if TYPE_CHECKING:
    from PIL.Image import Image

QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


class BalanceWeightMonitor(pl.Callback):
    """Log the balance weights of MTAdam, or what a balancer multiplies the losses by, to every logger of the trainer.

    Per term the median over the layers, ``balance_weight/<term>.median``, and the 10th and 90th percentile,
    ``weights_by_layer/<term>.p10`` and ``.p90``. So the number of series does not grow with the network. A layer that
    is frozen, or that a term never reached, does not count. A balancer that has one weight per term is logged as
    ``term_weight/<term>``; ``MetaBalance`` is logged as MTAdam is.

    To a TensorBoard logger also two pictures, ``balance_weight/all_terms``, the medians of all terms over the steps on
    one axis, and ``balance_weight/layers_by_terms``, a heatmap; a chart per term of the median between its percentiles
    (Custom Scalars); and a description of each tag. :func:`~lightning_mtadam.callbacks.plot_balance` draws the pictures
    without TensorBoard. Between logging steps it costs nothing.

    With several optimizers the first part of a tag tells them apart, as in
    :class:`~lightning.pytorch.callbacks.LearningRateMonitor`: ``balance_weight-MTAdam``, ``balance_weight-MTAdam-1``.

    Args:
        logging_interval: "step" and ``None`` log every ``log_every_n_steps`` of the trainer, "epoch" at the end of
            every epoch.
        max_series: every layer of every term is a series of its own, ``weights_by_layer.<term>/<layer>``, if these are
            not more than that; 0 asks for none.
        image_every_n: the pictures are drawn at the first logging step, and then every so many; 0 draws none.

    Attributes:
        history: what was logged over the steps, by the first part of the tags, for the pictures of a whole run.

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
        max_series: int = 0,
        image_every_n: int = 10,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException("logging_interval should be `step` or `epoch` or `None`.")
        self.logging_interval = logging_interval
        self.max_series = max_series
        self.image_every_n = image_every_n
        self.history: dict[str, History] = {}
        self._logged = 0
        self._told: set[str] = set()
        self._laid_out: dict[str, tuple[str, ...]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is something to log, and something to log it to."""
        self._laid_out = {}
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
        """How often it has logged and what, so that pictures go on in their rhythm and show the whole run."""
        return {"logged": self._logged, "history": {name: one.state_dict() for name, one in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self._logged = state_dict["logged"]
        found = state_dict.get("history", {})
        self.history = {name: History.from_state_dict(one) for name, one in found.items()}

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        read = readings(trainer)
        metrics: dict[str, float] = {}
        for reading in read:
            found = summaries(reading.terms, reading.table)
            self._remember(reading.prefix, step, found["median"])
            self._remember(TERM_WEIGHT, step, reading.term_weights)
            metrics |= _tagged(reading, found) | self._series(reading)
        if metrics:
            self._show(trainer, read, step)
            self._logged += 1
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def _remember(self, prefix: str, step: int, values: dict[str, float]) -> None:
        if values:
            self.history.setdefault(prefix, History()).add(step, values)

    def _series(self, reading: Reading) -> dict[str, float]:
        count = reading.table.numel()
        if count > self.max_series:
            if self.max_series and reading.prefix not in self._told:
                rank_zero_info(
                    f"BalanceWeightMonitor: {count} series (layers times terms) are more than max_series="
                    f"{self.max_series}; only the summaries over the layers are logged. Raise max_series, or balance"
                    " larger units with MTAdam(..., layers='module')."
                )
                self._told.add(reading.prefix)
            return {}
        return {
            tags.single(reading.prefix, term, layer): value
            for layer, row in zip(reading.layers, reading.table.tolist(), strict=True)
            for term, value in zip(reading.terms, row, strict=True)
            if math.isfinite(value)  # nan: the term never reached the layer; inf: the anchor's norm is next to nothing
        }

    def _show(self, trainer: pl.Trainer, read: list[Reading], step: int) -> None:
        """Write to TensorBoard what is no scalar."""
        writers = list(tensorboard.writers(trainer.loggers))
        shown = {prefix: tuple(history.series) for prefix, history in self.history.items()}
        if shown != self._laid_out:
            for writer in writers:
                tensorboard.explain(writer, shown, trainer.callback_metrics)
            self._laid_out = shown
        if writers and self.image_every_n > 0 and self._logged % self.image_every_n == 0:
            for tag, picture in self._pictures(read, step).items():
                for writer in writers:
                    tensorboard.add_picture(writer, tag, picture, step)

    def _pictures(self, read: list[Reading], step: int) -> dict[str, Image]:
        """The pictures of this step, by tag."""
        over_steps = [prefix for prefix, history in self.history.items() if history.steps[-1] == step]
        found = {tags.all_terms(prefix): terms_over_steps(prefix, self.history[prefix]) for prefix in over_steps}
        heatmaps = {tags.layers_by_terms(reading.prefix): reading for reading in read if reading.layers}
        return found | {tag: layers_by_terms(reading, f"at step {step:,}") for tag, reading in heatmaps.items()}


def summaries(terms: Sequence[str], table: Tensor) -> dict[str, dict[str, float]]:
    """The median and two percentiles over the layers that a term reaches, by name and term. ``table`` is [L, I]."""
    found: dict[str, dict[str, float]] = {name: {} for name in QUANTILES}
    for term, column in zip(terms, table.T, strict=True):
        reached = column[column.isfinite()]
        if len(reached):
            levels = torch.tensor(list(QUANTILES.values()), dtype=reached.dtype, device=reached.device)
            for name, value in zip(QUANTILES, torch.quantile(reached, levels).tolist(), strict=True):
                found[name][term] = value
    return found


def _tagged(reading: Reading, found: dict[str, dict[str, float]]) -> dict[str, float]:
    """All that is logged of a balance but for the series of single layers, by tag."""
    weights = {tags.term_weight(term): weight for term, weight in reading.term_weights.items()}
    medians_and_percentiles = {
        tags.summary(reading.prefix, term, quantile): value
        for quantile, values in found.items()
        for term, value in values.items()
    }
    return weights | medians_and_percentiles
