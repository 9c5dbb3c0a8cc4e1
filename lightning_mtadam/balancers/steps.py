"""Where an optimizer's step begins and ends, also that of an optimizer within another one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Steps:
    """Follows the steps of whatever optimizer holds some parameters.

    It listens to all optimizers of the process: what wraps one (SAM, Lookahead) may call no hooks, but the one within,
    which holds the same parameters, does. A copy follows steps of its own.

    Attributes:
        ended: whether a step has ended since the last batch; at first it is as if one had.
        evaluated: whether the step that is running has seen a batch already.
    """

    def __init__(self) -> None:
        self.ended, self.evaluated = True, False
        self._own: frozenset[int] = frozenset()  # the parameters, by identity
        self._running: list[weakref.ref[Optimizer]] = []  # the outermost first
        me = weakref.ref(self)
        for register, note in (
            (register_optimizer_step_pre_hook, Steps._begin),
            (register_optimizer_step_post_hook, Steps._end),
        ):
            handle = register(partial(_tell, me, note))
            weakref.finalize(self, handle.remove).atexit = False

    def __reduce__(self) -> tuple[type[Steps], tuple[()]]:
        return Steps, ()

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Follow the steps of the optimizers that hold any of these parameters."""
        self._own = frozenset(map(id, parameters))

    @property
    def running(self) -> bool:
        """Whether a step is running that holds them."""
        return any(self._holds(optimizer) for optimizer in (one() for one in self._running) if optimizer is not None)

    def _begin(self, optimizer: Optimizer) -> None:
        self._leave(optimizer)  # an error may have ended it before
        self._running.append(weakref.ref(optimizer))
        if self._holds(optimizer):
            self.evaluated = False

    def _end(self, optimizer: Optimizer) -> None:
        self._leave(optimizer)
        if self._holds(optimizer):
            self.ended, self.evaluated = True, False

    def _leave(self, optimizer: Optimizer) -> None:
        """Forget a step, and those that began within it."""
        found = [at for at, one in enumerate(self._running) if one() is optimizer]
        if found:
            del self._running[found[0] :]

    def _holds(self, optimizer: Optimizer) -> bool:
        return any(id(parameter) in self._own for group in optimizer.param_groups for parameter in group["params"])


def _tell(me: weakref.ref[Steps], note: Any, optimizer: Optimizer, *_: Any) -> None:
    steps = me()
    if steps is not None:
        note(steps, optimizer)
