"""Constants on any device, which travel there once: the host would wait for every copy."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from threading import Lock

import torch
from torch import Tensor

LIMIT = 1 << 22  # bytes of what is kept: it serves all optimizers of the process, and outlives them
_OVERHEAD = 512  # bytes of the objects of one constant, beside its numbers
_kept: dict[Hashable, tuple[Tensor, int]] = {}  # with the bytes each takes; what was asked for last stands last
_taken, _lock = [0], Lock()


def constant(values: Sequence[float] | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same tensor for the same values; never write to it.

    Example:
        >>> constant([1, 2], torch.float32, torch.device("cpu"))
        tensor([1., 2.])
    """
    numbers = array("d", (values,) if isinstance(values, (int, float)) else values).tobytes()
    key = numbers, isinstance(values, (int, float)), dtype, device
    with _lock:
        if key in _kept:
            _kept[key] = _kept.pop(key)
            return _kept[key][0]
    with torch.inference_mode(False):  # what an evaluation makes is used by the next step
        made = torch.tensor(values, dtype=dtype, device=device)
    size = len(numbers) + made.nbytes + _OVERHEAD
    with _lock:
        if size <= LIMIT and key not in _kept:
            _kept[key], _taken[0] = (made, size), _taken[0] + size
        while _taken[0] > LIMIT:  # what was not asked for the longest goes
            _taken[0] -= _kept.pop(next(iter(_kept)))[1]
    return made
