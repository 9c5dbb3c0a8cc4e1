"""The pictures of a balance without TensorBoard: in a notebook, or to be saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_mtadam.balancer_slot import mtadam_of
from lightning_mtadam.callbacks.balance_pictures import layers_by_terms, terms_over_steps, weights_by_terms
from lightning_mtadam.callbacks.balance_weights import BalanceWeightMonitor
from lightning_mtadam.callbacks.drawing import stacked
from lightning_mtadam.callbacks.log_directory import pictures_of
from lightning_mtadam.callbacks.readings import Reading, readings
from lightning_mtadam.callbacks.tags import WEIGHT
from lightning_mtadam.lightning_internals import unwrap
from lightning_mtadam.terms import BalancesTerms

if TYPE_CHECKING:
    from PIL.Image import Image


def plot_balance(source: object) -> Image:
    """Draw the balance: of an optimizer as it is now, of a Trainer, or of a run from its log directory.

    What each of them gives:

    - an MTAdam, or a balancer: the heatmap of layers by terms, or the weights of the losses, as they are now;
    - a Trainer: these, of all its optimizers, and before them all terms over the steps, if it has a
      :class:`~lightning_mtadam.callbacks.BalanceWeightMonitor`;
    - the log directory of a ``TensorBoardLogger``: all terms over the steps, and the last heatmap that was logged; of a
      ``CSVLogger``: all terms over the steps.

    Args:
        source: one of these.

    Returns:
        A Pillow image, which a notebook shows as it is, and ``.save("balance.png")`` writes.

    Raises:
        TypeError: it is none of these.
        ValueError: it has no balance yet; a directory of several runs.
        FileNotFoundError: there is no such directory, or no log in it.
        ImportError: Pillow is not installed; or event files, and tensorboard is not.

    Example:
        >>> import torch
        >>> from lightning_mtadam import MTAdam
        >>> weights = torch.nn.Linear(3, 1)
        >>> optimizer = MTAdam(weights.named_parameters())
        >>> output = weights(torch.ones(8, 3))
        >>> optimizer.backward({"fit": (output - 1).square().mean(), "size": 30 * output.abs().mean()})
        >>> optimizer.step()
        >>> picture = plot_balance(optimizer)
        >>> picture.mode
        'RGB'
    """
    if isinstance(source, (str, os.PathLike)):
        return stacked(pictures_of(Path(source)))
    found = _of_trainer(source) if isinstance(source, pl.Trainer) else _drawn([_reading_of(source)])
    if not found:
        raise ValueError(
            f"The {type(source).__name__} has no balance yet, or nothing in it balances losses. Train a step with"
            " MTAdam or with a balancer first."
        )
    return stacked(found)


def _of_trainer(trainer: pl.Trainer) -> list[Image]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    monitors = [callback for callback in callbacks if isinstance(callback, BalanceWeightMonitor)]
    histories = monitors[0].history if monitors else {}
    over_steps = [terms_over_steps(prefix, history) for prefix, history in histories.items()]
    return over_steps + _drawn(readings(trainer))


def _reading_of(source: object) -> Reading:
    balancer: object = source
    if isinstance(source, Optimizer):
        balancer = mtadam_of(unwrap(source)) or source
    if not isinstance(balancer, BalancesTerms):
        raise TypeError(
            "plot_balance takes an MTAdam optimizer, a balancer, a Trainer or a log directory, but got a"
            f" {type(source).__name__}. Give what balanced the losses."
        )
    groups = balancer.param_groups if isinstance(balancer, Optimizer) else []
    named = [pair for group in groups for pair in zip(group.get("param_names", ()), group["params"], strict=False)]
    return Reading.of(WEIGHT, balancer, named)


def _drawn(read: list[Reading]) -> list[Image]:
    layers = [layers_by_terms(reading) for reading in read if reading.layers]
    return layers + [weights_by_terms(reading) for reading in read if reading.term_weights]
