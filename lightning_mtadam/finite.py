"""Whether all gradients of a step are finite, which the host may learn later."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam.terms import NonFiniteError, is_host, non_finite, warn


class Sent:
    """A tensor on its way to the host, which may be far ahead of an accelerator and is not to wait for it."""

    def __init__(self, tensor: Tensor) -> None:
        pinned = tensor.device.type == "cuda"
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        self._copy.copy_(tensor, non_blocking=True)
        self._event = None if tensor.device.type == "cpu" else torch.Event(tensor.device)
        if self._event is not None:  # on the tensor's device, which need not be the current one
            self._event.record(torch.accelerator.current_stream(tensor.device))

    def receive(self) -> Any:
        """Its elements, as lists; the host waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()


class FiniteWatch:
    """Looks at the norms of all gradients, once a step.

    On the host a step with an inf or nan raises before it changes anything. An accelerator may be far behind the host:
    there the step runs on, with a flag so that it changes nothing either, and the next call raises for it.
    """

    def __init__(self, *, skips: bool = False) -> None:
        self.skips, self._warned = skips, False
        self.sent: tuple[Sent, Tensor, Sequence[str], Sequence[str]] | None = None
        self.told: list[bool] = []  # what came along with the last flag

    def check(
        self, norms: Tensor, layers: Sequence[str], terms: Sequence[str], along: Tensor | None = None
    ) -> Tensor | None:
        """Look at the norms [P, I] of a step, of P named layers and I terms; ``NonFiniteError`` names term and layer.

        ``along``, boolean [n], travels to the host with what was found, for who wants to know it later.

        Returns:
            ``None`` on the host; else a boolean scalar: whether the step may change anything.
        """
        if is_host(norms.device):
            # Norms are not negative, so their sum is finite only if all are; it may overflow where none is.
            if not math.isfinite(norms.sum()) and not bool(norms.isfinite().all()):
                raise non_finite(norms, layers, terms)
            return None
        finite = norms.isfinite().all()
        self.sent = Sent(finite[None] if along is None else torch.cat([finite[None], along])), norms, layers, terms
        return finite

    def recall(self) -> None:
        """Raise ``NonFiniteError`` if the step before was not finite, and that was not known then."""
        if self.sent is None:
            return
        (sent, norms, layers, terms), self.sent = self.sent, None
        finite, *self.told = sent.receive()
        if not finite:
            raise non_finite(norms, layers, terms)

    @contextmanager
    def tolerating(self) -> Iterator[None]:
        """Warn of what is not finite, once, in place of raising, if such steps are to be skipped."""
        try:
            yield
        except NonFiniteError as error:
            if not self.skips:
                raise
            if not self._warned:
                self._warned = True
                warn(f"A step was skipped; others will be without a word. {error}")
