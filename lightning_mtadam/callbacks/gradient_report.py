"""Reports, every some steps, what each loss does to the network: norms, shares in the update, conflicts."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_mtadam import lightning_internals
from lightning_mtadam.callbacks import tensorboard
from lightning_mtadam.callbacks.coming_losses import Followed, Given, coming_losses, scale_left
from lightning_mtadam.callbacks.gradient_pictures import add_pictures
from lightning_mtadam.callbacks.gradient_summary import GradientSummary
from lightning_mtadam.callbacks.measured_step import by_layer
from lightning_mtadam.gradient_statistics import GradientStatistics
from lightning_mtadam.layers import LAYER_RULES, LayerRule
from lightning_mtadam.terms import Losses, check_losses, warn


class GradientReport(pl.Callback):
    """Report what each loss does: its gradient's norm, its share in the update, its cosine to the others.

    It tells which terms are *dead* (no gradient), *drowned* (a share of the update below 1 %) or in *conflict* (a
    cosine below -0.05), over the network and by layer. It works with any
    :class:`~lightning_mtadam.MultiTermLightningModule` whose step gives named losses, whatever trains it, and with an
    ordinary LightningModule that calls :func:`report_losses`.

    Every logger of the trainer gets ``gradient_norm/<term>``, ``gradient_share/<term>``, ``gradient_alignment``,
    ``gradient_cosine/<term>.<other>`` and ``gradient_cosine/<term>.update``, and the number of terms that are
    ``gradient_terms/dead`` or ``drowned`` and of pairs that are ``conflicts``. TensorBoard also gets pictures of terms
    by terms and of layers by terms. Programs find all of it in ``latest``. ``docs/gradient_report.md`` says how to
    read it.

    **What it costs.** With MTAdam, and with balancers that take the gradient of every term, one multiplication of these
    gradients with each other, in its steps. With all else one extra backward pass per term in its steps, which leaves
    training as it is, bit for bit, and holds the gradients of all terms for that time; so it does with ``low_memory``.
    Between its steps it does nothing. With ``balance_every`` it waits for a step in which terms are measured.

    What is reported is the gradient that the optimizer steps on, before clipping: accumulated over the batches of the
    step, averaged over the processes, without a gradient scaler's factor. A step with an inf or nan is not reported;
    the next one is.

    Args:
        every_n_steps: steps of the optimizer from one report to the next; the first is at step 0.
        layers: what is a row of the reports by layer: a "module" (its weight and bias together), a "parameter", or what
            a function makes of a parameter's name.
        image_every_n: pictures are drawn of the first report, and then of every so many; 0 draws none.

    Attributes:
        latest: the last report; ``None`` before the first.
        reports: the last one of each optimizer, by its name: ``"Adam"``, ``"Adam-1"``.

    Raises:
        MisconfigurationException: a training step gives no losses by name, or one alone.
        TypeError: a number is no integer.
        ValueError: ``every_n_steps`` is below 1, ``image_every_n`` below 0, or ``layers`` an unknown name.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_mtadam.callbacks import GradientReport
        >>> report = GradientReport(every_n_steps=50)
        >>> trainer = Trainer(callbacks=[report], accelerator="cpu")
    """

    def __init__(self, every_n_steps: int = 50, *, layers: LayerRule = "module", image_every_n: int = 10) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("image_every_n", image_every_n)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, but is {value!r}.")
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps must be at least 1, but is {every_n_steps}. To report nothing, leave it out."
            )
        if not callable(layers) and layers not in LAYER_RULES:
            raise ValueError(f"layers must be one of {LAYER_RULES}, or a function of a name, but is {layers!r}.")
        if image_every_n < 0:
            raise ValueError(f"image_every_n must be at least 0, which draws nothing, but is {image_every_n}.")
        self.every_n_steps, self.layers, self.image_every_n = every_n_steps, layers, image_every_n
        self.latest: GradientSummary | None = None
        self.reports: dict[str, GradientSummary] = {}
        self._followed: list[Followed] = []
        self._given: Given | None = None  # to report_losses
        self._new: list[tuple[str, GradientSummary, GradientStatistics]] = []  # of this batch

    @property
    def state_key(self) -> str:
        """Reports of another rhythm have a state of their own in checkpoints."""
        return self._generate_state_key(every_n_steps=self.every_n_steps)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew; a checkpoint is loaded after this."""
        if stage == "fit":
            self._followed, self._given, self._new, self.latest, self.reports = [], None, [], None, {}

    def take(self, losses: Losses, optimizer: Optimizer | None = None) -> None:
        """Take the ``losses`` of ``optimizer`` that the next backward pass is of; :func:`report_losses` calls it."""
        self._given = dict(losses), optimizer

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """In a step of the report, differentiate the losses one by one, unless MTAdam or a balancer will do so."""
        given, self._given = self._given, None
        if self.reports and not any(one.is_due for one in self._followed):
            return
        coming = coming_losses(trainer, pl_module, given)
        if coming is None:
            if pl_module.automatic_optimization and not self.reports:
                raise MisconfigurationException(NO_NAMES)
            return
        followed = self._of(trainer, coming.optimizer)
        if not followed.is_due:
            return
        step = followed.begin(coming.optimizer)
        step.balancer = coming.balancer
        step.names.update(dict.fromkeys(coming.losses))
        alone = len(step.names.keys() | set(getattr(coming.balancer, "terms", ()))) < 2
        if alone and pl_module.automatic_optimization and not self.reports:
            raise MisconfigurationException(ONE_NAME.format(*step.names))
        if step.needs_passes:
            step.beside.add(coming.batch(trainer))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure, if a report is due."""
        optimizer = lightning_internals.unwrap(optimizer)
        followed = self._of(trainer, optimizer)
        number, step = followed.steps, followed.end(trainer.global_step)
        found = None if step is None else step.measure(optimizer, scale_left(trainer, optimizer))
        if found is None:
            return
        followed.due = (number // self.every_n_steps + 1) * self.every_n_steps
        statistics, names = by_layer(found[0], pl_module, optimizer, self.layers)
        name = _name_of(trainer, optimizer)
        self.latest = self.reports[name] = GradientSummary.of_layers(statistics, found[1], number, names)
        self._new.append((f"-{name}" if len(trainer.optimizers) > 1 else "", self.latest, statistics))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Log what was measured."""
        for suffix, summary, statistics in self._new:
            step, metrics = lightning_internals.logging_step(trainer), summary.scalars(suffix)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
            due = self.image_every_n > 0 and summary.step // self.every_n_steps % self.image_every_n == 0
            for writer in tensorboard.writers(trainer.loggers) if due else ():
                add_pictures(writer, suffix, summary.terms, list(summary.layers), statistics, step)
        if self._new:
            self._new = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell, if a report was due and none has come."""
        if not self.reports and any(one.steps and one.is_due for one in self._followed):
            warn(NO_NAMES)

    def state_dict(self) -> dict[str, Any]:
        """Where it is in its rhythm."""
        return {"followed": [[one.steps, one.due] for one in self._followed]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self._followed = [Followed(*pair) for pair in state_dict["followed"]]

    def __getstate__(self) -> dict[str, Any]:
        kept = [Followed(one.steps, one.due) for one in self._followed]
        return {**self.__dict__, "_followed": kept, "_given": None, "_new": []}

    def _of(self, trainer: pl.Trainer, optimizer: Optimizer) -> Followed:
        missing = len(trainer.optimizers) - len(self._followed)
        self._followed += [Followed() for _ in range(missing)]
        return next(one for one, its in zip(self._followed, trainer.optimizers, strict=False) if its is optimizer)


def report_losses(module: pl.LightningModule, losses: Losses, optimizer: Optimizer | None = None) -> Tensor:
    """Name the losses of an ordinary LightningModule's training step for :class:`GradientReport`; gives their sum.

    Call it in ``training_step``, before the backward pass. Give the losses as they are added up, with their weights:
    the report is of the gradients of these. Without a report in the trainer, and outside of training, it only adds up.
    A :class:`~lightning_mtadam.MultiTermLightningModule` names its losses by itself.

    Args:
        module: the module.
        losses: scalars by name.
        optimizer: whose losses they are, where there are several optimizers.

    Raises:
        TypeError: no mapping, or something that is no real floating-point tensor.
        ValueError: no losses, or one that is no scalar.

    Example:
        In ``training_step`` of an ordinary LightningModule::

            return report_losses(self, {"reconstruction": reconstruction, "kl": 0.1 * kl})
    """
    if lightning_internals.has_trainer(module) and module.trainer.training and torch.is_grad_enabled():
        check_losses(losses, finite=False, graph=False)
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientReport):
                callback.take(losses, optimizer)
    return reduce(add, losses.values())


def _name_of(trainer: pl.Trainer, optimizer: Optimizer) -> str:
    """The optimizer's class, with a number from the second one on."""
    alike = [one for one in trainer.optimizers if type(one) is type(optimizer)]
    index = next(index for index, one in enumerate(alike) if one is optimizer)
    return type(optimizer).__name__ + (f"-{index}" if index else "")


NO_NAMES = (
    "GradientReport has nothing to report: the training step has given no losses by name. Return {'name': loss, ...}"
    " from the training_step of a MultiTermLightningModule, or give them to its backward_terms; call"
    " report_losses(self, {'name': loss, ...}) in that of an ordinary LightningModule; or leave the callback out."
)
ONE_NAME = (
    "GradientReport compares losses, but the training step has given one alone, {!r}. Return each of its parts by name."
    " If others come in later steps, return zeros for them in the first: torch.zeros(())."
)
