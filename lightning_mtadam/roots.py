"""Lightning comes as ``lightning.pytorch`` and as ``pytorch_lightning``: what to say where the two are mixed."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_mtadam import lightning_internals
from lightning_mtadam.balancer_slot import BalancerSlot

HOMES = {"lightning.pytorch": "lightning_mtadam", "pytorch_lightning": "lightning_mtadam.pytorch_lightning"}
"""Where what is for the trainers of each package is imported from."""


def explain_other_modules() -> None:
    """Let trainers say what to import where they are given a module of this package for the other one's trainers."""
    lightning_internals.ask_first(refuse_other_module)


def refuse_other_module(model: object) -> None:
    """Raise ``TypeError`` if a ``model`` that is no LightningModule here is a ``MultiTermLightningModule``."""
    if isinstance(model, BalancerSlot) and not isinstance(model, pl.LightningModule):
        raise TypeError(_message(type(model).__name__, "MultiTermLightningModule", ""))


def refuse_other_callbacks(trainer: pl.Trainer) -> None:
    """Raise ``TypeError`` if the ``trainer`` has a callback of this package for the other one's trainers."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        ours = [kind for kind in type(callback).__mro__ if kind.__module__.startswith("lightning_mtadam.")]
        if ours and not isinstance(callback, pl.Callback):
            raise TypeError(_message(type(callback).__name__, ours[0].__name__, ".callbacks"))


def _message(given: str, name: str, place: str) -> str:
    here = pl.__name__
    (other,) = HOMES.keys() - {here}
    return (
        f"{given} is for trainers of {other}, but this Trainer is of {here}. Write from {HOMES[here]}{place} import"
        f" {name}; or import the Trainer, and all else of Lightning, from {other}."
    )
