"""Every private attribute of Lightning that the package relies on, in one place.

``tests/test_lightning_internals.py`` fails by name when one of them moves. It imports nothing of the package, and
Lightning where it is needed only: the optimizer, which uses this file too, works without it.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl
    from lightning.pytorch.loops.optimization.automatic import ClosureResult


def set_result_reader(trainer: pl.Trainer, read: Callable[[Any, int], ClosureResult]) -> None:
    """Let ``read(training_step_output, accumulate_grad_batches)`` make the result of an automatic training step."""
    trainer.fit_loop.epoch_loop.automatic_optimization.output_result_cls = _ResultReader(read)  # type: ignore[assignment]


class _ResultReader:
    def __init__(self, read: Callable[[Any, int], ClosureResult]) -> None:
        self.from_training_step_output = read


def skips_backward(trainer: pl.Trainer) -> bool:
    """Whether training steps run without backward, as in the last epoch of stochastic weight averaging."""
    return trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward


@contextmanager
def logging_as(module: pl.LightningModule, hook: str) -> Iterator[None]:
    """Make ``self.log`` believe that it is called in ``hook``."""
    before = module._current_fx_name
    module._current_fx_name = hook
    try:
        yield
    finally:
        module._current_fx_name = before


def has_logged(trainer: pl.Trainer, hook: str, name: str) -> bool:
    """Whether ``self.log(name, ...)`` was called in ``hook`` in this epoch."""
    return trainer._results is not None and f"{hook}.{name}" in trainer._results


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The optimizer that Lightning wrapped, or the one given."""
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def has_comm_hook(strategy: object) -> bool:
    """Whether a communication hook of DDP was given to the strategy."""
    return getattr(strategy, "_ddp_comm_hook", None) is not None


def should_log(trainer: pl.Trainer) -> bool:
    """Whether the batch that has just ended took an optimizer step that is to be logged."""
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()


def logging_step(trainer: pl.Trainer) -> int:
    """The step under which ``self.log`` files a batch, when it ends; one more than that when the epoch ends."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


@contextmanager
def as_fabric_backward() -> Iterator[None]:
    """Count as ``fabric.backward``: under mixed precision the modules of Fabric refuse any other backward pass.

    Beside that it would scale the loss, which is the caller's to do, and nothing else.
    """
    wrappers = sys.modules.get("lightning.fabric.wrappers")
    if wrappers is None:
        yield
        return
    before = wrappers._in_fabric_backward
    wrappers._in_fabric_backward = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        wrappers._in_fabric_backward = before  # type: ignore[attr-defined]
