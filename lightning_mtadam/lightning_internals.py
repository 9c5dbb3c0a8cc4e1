"""Every private attribute of Lightning that the package relies on, in one place.

``tests/test_lightning_internals.py`` fails by name when one of them moves. It imports nothing of the package, and
Lightning where it is needed only: the optimizer, which uses this file too, works without it.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import lightning.pytorch as pl
    from lightning.pytorch.loops.optimization.automatic import ClosureResult


def set_result_reader(trainer: pl.Trainer, read: Callable[[Any, int], ClosureResult]) -> None:
    """Let ``read(training_step_output, accumulate_grad_batches)`` make the result of an automatic training step."""
    trainer.fit_loop.epoch_loop.automatic_optimization.output_result_cls = _ResultReader(read)  # type: ignore[assignment]


class _ResultReader:
    def __init__(self, read: Callable[[Any, int], ClosureResult]) -> None:
        self.from_training_step_output = read


class LogBeside:
    """Logs numbers while a trainer trains, and their means over the batches of an epoch as ``<name>_epoch``.

    What anybody gives to ``self.log`` under such a name, at any time, stands in its place. Of a run of one epoch, in
    which a mean is a single point, loggers get that of ``total`` alone; callbacks read all.
    """

    def __init__(self, trainer: pl.Trainer, total: str = "") -> None:
        self._trainer, self._total = trainer, total
        self._last: dict[str, Tensor] = {}
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}  # and of how many batches
        self._bar: dict[str, tuple[str, Tensor | float]] = {}  # by what they are called there
        trainer.fit_loop.epoch_loop._results = _results_with(self._complete, self._forget)

    def add(self, names: tuple[str, ...], numbers: Tensor, *, on_bar: Mapping[str, str]) -> None:
        """Log the numbers of a batch, [n], each under its name; those in ``on_bar`` on the progress bar, as it says.

        To show them, the host waits for them: on an accelerator it does so only where the trainer logs.
        """
        numbers = numbers if numbers.dtype == torch.float64 else numbers.float()
        self._last.update(zip(names, numbers.unbind(), strict=True))
        total, count = self._sums.get(names, (torch.zeros_like(numbers), 0))
        self._sums[names] = total + numbers, count + 1
        if numbers.device.type == "cpu" or should_log(self._trainer):
            for name in names:
                if name in on_bar:
                    self._bar[on_bar[name]] = name, self._last[name]

    def _complete(self, metrics: dict[str, dict[str, Any]], on_step: bool) -> None:
        """Add the last numbers, or the means, to what Lightning reads, unless others log under their names."""
        loop = self._trainer.fit_loop.epoch_loop
        taken = {one.meta.name for results in (loop._results, loop.val_loop._results) for one in results.values()}
        found = {
            name: number for name, number in (self._last if on_step else self._means()).items() if name not in taken
        }
        if not on_step:
            found = {f"{name}_epoch": mean for name, mean in found.items() if f"{name}_epoch" not in taken}
        metrics["callback"] |= found
        one_epoch = not on_step and self._trainer.max_epochs == 1
        metrics["log"] |= {name: one for name, one in found.items() if not one_epoch or name == f"{self._total}_epoch"}
        if on_step:
            found = {short: one for short, (_, one) in self._bar.items() if isinstance(one, Tensor)}
            numbers = torch.stack(list(found.values())).tolist() if found else []  # they come to the host together
            self._bar |= {short: (self._bar[short][0], one) for short, one in zip(found, numbers, strict=True)}
            metrics["pbar"] |= {short: one for short, (name, one) in self._bar.items() if not taken & {name, short}}

    def _means(self) -> dict[str, Tensor]:
        sums: dict[str, Any] = dict.fromkeys(self._last, 0)
        counts = dict.fromkeys(self._last, 0)
        for names, (total, count) in self._sums.items():
            for name, number in zip(names, total.unbind(), strict=True):
                sums[name] = sums[name] + number
                counts[name] += count
        return {name: sums[name] / counts[name] for name in sums}

    def _forget(self) -> None:
        """Begin a new epoch."""
        for kept in (self._last, self._sums, self._bar):
            kept.clear()


def _results_with(complete: Callable[[dict[str, dict[str, Any]], bool], None], forget: Callable[[], None]) -> Any:
    """Results of training that are completed when they are read, and forgotten when an epoch has ended."""
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection

    class Results(_ResultCollection):
        def __bool__(self) -> bool:
            return True  # Lightning does not read results that are empty

        def metrics(self, on_step: bool) -> Any:
            found = super().metrics(on_step)
            complete(found, on_step)  # type: ignore[arg-type]
            return found

        def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
            super().reset(metrics, fx)
            if fx is None:
                forget()

    return Results(training=True)


def skips_backward(trainer: pl.Trainer) -> bool:
    """Whether training steps run without backward, as in the last epoch of stochastic weight averaging."""
    return trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward


def has_trainer(module: object) -> bool:
    """Whether a module is attached to a trainer; to ask for its trainer would raise if not."""
    return getattr(module, "_trainer", None) is not None


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


def ask_first(check: Callable[[object], None]) -> None:
    """Call ``check(model)`` before a trainer says that a model, which torch may have compiled, is none of its own."""
    from lightning.pytorch.utilities import compile

    place: Any = compile
    usual = place._check_mixed_imports

    def both(model: object) -> None:
        check(getattr(model, "_orig_mod", model))
        usual(model)

    if not hasattr(usual, "asks_first"):
        both.asks_first = check  # type: ignore[attr-defined]
        place._check_mixed_imports = both


@contextmanager
def as_fabric_backward() -> Iterator[None]:
    """Count as ``fabric.backward``: under mixed precision the modules of Fabric refuse any other backward pass.

    Beside that it would scale the loss, which is the caller's to do, and nothing else.
    """
    loaded: list[tuple[Any, bool]] = []
    for name in ("lightning.fabric.wrappers", "lightning_fabric.wrappers"):
        wrappers: Any = sys.modules.get(name)
        if wrappers is not None:
            loaded.append((wrappers, wrappers._in_fabric_backward))
            wrappers._in_fabric_backward = True
    try:
        yield
    finally:
        for wrappers, before in loaded:
            wrappers._in_fabric_backward = before
