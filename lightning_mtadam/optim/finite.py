"""Notices gradients that are inf or nan, without making the host wait for an accelerator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam.terms import NonFiniteError


def is_host(device: torch.device) -> bool:
    """Whether the host can read the device's tensors at once."""
    return device.type == "cpu"


class FiniteWatch:
    """Looks at the norms of all gradients, once a step.

    On the host a step with an inf or nan raises before it changes anything. An accelerator may be many operations
    behind the host: there the step runs on, multiplied by a flag so that it changes nothing either, and the next call
    raises for it, when the flag has long arrived.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, Any, Tensor, Sequence[str], Sequence[str]] | None = None

    def check(self, norms: Tensor, layers: Sequence[str], terms: Sequence[str]) -> Tensor | None:
        """Look at the norms of a step.

        Args:
            norms: [P, I].
            layers: P names.
            terms: I names.

        Returns:
            ``None`` on the host; else a boolean scalar: whether the step may change anything.

        Raises:
            NonFiniteError: naming term and layer.
        """
        if is_host(norms.device):
            # Norms are not negative, so their sum is finite only if all are; it may overflow where none is.
            if not math.isfinite(norms.sum()) and not bool(norms.isfinite().all()):
                raise non_finite(norms, layers, terms)
            return None
        finite = norms.isfinite().all()
        copy = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=torch.cuda.is_available())
        copy.copy_(finite, non_blocking=True)
        self._sent = copy, _event(norms.device), norms, layers, terms
        return finite

    def recall(self) -> None:
        """Raise if the step before was not finite, and that was not known then.

        Raises:
            NonFiniteError: naming term and layer.
        """
        if self._sent is None:
            return
        (copy, event, norms, layers, terms), self._sent = self._sent, None
        if event is not None:
            event.synchronize()
        if not copy.numpy():  # memory of the host
            raise non_finite(norms, layers, terms)


def _event(device: torch.device) -> Any:
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return event


def non_finite(
    norms: Tensor, layers: Sequence[str], terms: Sequence[str], left: str = "Nothing was changed."
) -> NonFiniteError:
    """The error that names the first norm [P, I] that is inf or nan, and says in what state all is left."""
    row, column = (int(index) for index in (~norms.isfinite()).nonzero()[0])
    return NonFiniteError(
        f"The gradient of the term {terms[column]!r} at the layer {layers[row]!r} is not finite: its norm is"
        f" {float(norms[row, column])} in {norms.dtype}. {left} Look for a division by zero or a root of zero in that"
        " loss, or lower the learning rate."
    )
