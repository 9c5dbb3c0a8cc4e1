"""What MTAdam holds between ``backward`` and ``step``, for who looks at it."""

from __future__ import annotations

from torch import Tensor

from lightning_mtadam.optim.term_optimizer import TermOptimizer
from lightning_mtadam.terms import TermGradients


class ObservedOptimizer(TermOptimizer):
    """A term optimizer whose gradients can be looked at; looking changes nothing."""

    @property
    def consumes_at_once(self) -> bool:
        """Whether no gradients are held for the step: with ``low_memory``."""
        return self._options.low_memory

    def held(self) -> tuple[TermGradients, Tensor] | None:
        """The terms' gradients, [P] each, and their scales, [P, I]; ``None`` where none were measured, or after a step.

        They are accumulated, averaged over the processes, without the loss scale, and not to be written to. With
        ``low_memory`` there are no gradients any more, but scales.
        """
        pending = self._pending
        if pending.shown is None or pending.light:
            return None
        updater = self._updater()
        found = updater.tables.by_parameter((pending.absorbed or updater).scales_of(pending))
        scales = found.new_zeros(len(updater.tables.parameters), found.shape[1])
        scales[updater.tables.members] = found
        return dict(pending.gradients), scales
