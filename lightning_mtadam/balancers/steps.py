"""Where an optimizer's step begins and ends, also where it is the step of an optimizer within another one."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_mtadam.terms import is_running
from lightning_mtadam.wrappers import within


class Steps:
    """Follows the steps of an optimizer, and of those that it wraps, as SAM and Lookahead do. A copy follows none yet.

    Attributes:
        ended: whether a step has ended since the last batch; at first it is as if one had.
        running: whether a step has begun and not ended.
        evaluated: whether the step that is running has seen a batch already.
    """

    def __init__(self) -> None:
        self.ended, self.running, self.evaluated = True, False, False
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._handles: list[RemovableHandle] = []

    def __reduce__(self) -> tuple[type[Steps], tuple[()]]:
        return Steps, ()

    def follow(self, optimizer: Optimizer) -> bool:
        """Follow the steps of this optimizer, one of which may be running. Whether it is another one than before."""
        if self._optimizer is not None and self._optimizer() is optimizer:
            return False
        for handle in self._handles:
            handle.remove()
        self._optimizer, self._handles, me = weakref.ref(optimizer), [], weakref.ref(self)
        optimizers = list(within(optimizer))
        self.running, self.evaluated = any(is_running(type(one).step) for one in optimizers), False
        for one in optimizers:
            with contextlib.suppress(AttributeError):  # a wrapper that does not call the constructor has no hooks
                self._handles.append(one.register_step_pre_hook(partial(_tell, me, Steps.note_begin)))
                self._handles.append(one.register_step_post_hook(partial(_tell, me, Steps.note_end)))
        return True

    def note_batch(self) -> None:
        """A batch was balanced."""
        self.ended, self.evaluated = False, self.running

    def note_begin(self) -> None:
        """A step begins; an error may have ended the one before."""
        self.running, self.evaluated = True, False

    def note_end(self) -> None:
        """A step has ended."""
        self.ended, self.running, self.evaluated = True, False, False


def _tell(me: weakref.ref[Steps], note: Callable[[Steps], None], *_: Any) -> None:
    steps = me()
    if steps is not None:
        note(steps)
