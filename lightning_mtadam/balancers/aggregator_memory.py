"""What an aggregator remembers from call to call, so that a call can be repeated and a run resumed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mtadam.terms import is_host

Aggregator: TypeAlias = Callable[[Tensor], Any]
"""Makes a vector [n] of a matrix [I, n]. A type that said so would keep LightningCLI from making objects that do."""


def is_of_torchjd(value: object, part: str, kind: str) -> bool:
    """Whether a value is of a kind that a part of TorchJD defines; TorchJD itself is not imported for it."""
    defined = getattr(sys.modules.get(f"torchjd.{part}"), kind, None)
    return defined is not None and isinstance(value, defined)


class AggregatorMemory:
    """Calls an aggregator in a given state, and says in what state that leaves it.

    The state is those numbers, tensors and arrays among the attributes of the aggregator, and of its modules, that
    calls change. What else it makes of its first matrix, such as a problem for a solver, it makes anew in each process:
    before a state that comes from another one is put in place, it is called once for that.

    Args:
        aggregator: a matrix [I, n] -> a vector [n].
    """

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = aggregator
        self._initial: dict[str, Any] | None = None  # before the first call in this process
        self._moving: set[str] = set()

    def call(self, matrix: Tensor, state: Mapping[str, Tensor], seed: str) -> tuple[Any, dict[str, Tensor]]:
        """What the aggregator makes of a matrix, and its state after that.

        Args:
            matrix: [I, n].
            state: what the call before gave; empty for the first.
            seed: what is drawn in the call depends on it alone; no other drawing is disturbed.
        """
        if self._initial is None:
            self._initial = _snapshot(self.aggregator)
            if state:
                with drawing_from(seed, matrix.device):
                    self.aggregator(matrix)
        self._moving |= state.keys()
        self._restore(state)
        before, versions = _snapshot(self.aggregator), _versions(self.aggregator)
        with drawing_from(seed, matrix.device):
            vector = self.aggregator(matrix)
        after = _snapshot(self.aggregator)
        written = {key for key, version in _versions(self.aggregator).items() if version != versions.get(key)}
        self._moving |= {key for key, value in after.items() if not _same(value, before.get(key), key in written)}
        return vector, {key: after[key] for key in sorted(self._moving) if isinstance(after.get(key), Tensor)}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        assert self._initial is not None
        owners = dict(_owners(self.aggregator))
        for key in self._moving:
            path, _, name = key.rpartition(".")
            if key in state or key in self._initial:
                value = state[key] if key in state else self._initial[key]
                setattr(owners[path], name, _like(getattr(owners[path], name, None), value))
            elif hasattr(owners[path], name):
                delattr(owners[path], name)


@contextmanager
def drawing_from(seed: str, device: torch.device) -> Iterator[None]:
    """Let torch's random numbers, on the host and this device, depend on the seed; afterwards go on as before."""
    number = Random(seed).getrandbits(63)
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number)
            yield
        return
    accelerator = torch.get_device_module(device)
    with torch.random.fork_rng(devices=[device], device_type=device.type), accelerator.device(device):
        torch.default_generator.manual_seed(number)
        accelerator.manual_seed(number)
        yield


def _owners(aggregator: Aggregator) -> Iterator[tuple[str, Any]]:
    """The aggregator and its modules, by the path to each."""
    if isinstance(aggregator, nn.Module):
        yield from aggregator.named_modules(prefix="aggregator")
    else:
        yield "aggregator", aggregator


def _attributes(aggregator: Aggregator) -> Iterator[tuple[str, Any]]:
    """All attributes and buffers, by the path to each."""
    for path, owner in _owners(aggregator):
        attributes = getattr(owner, "__dict__", {})
        for name, value in {**attributes, **attributes.get("_buffers", {})}.items():
            yield f"{path}.{name}", value


def _snapshot(aggregator: Aggregator) -> dict[str, Any]:
    """All attributes: copies of numbers, tensors and arrays as tensors, the others as they are."""
    return {key: _as_tensor(value) for key, value in _attributes(aggregator)}


def _versions(aggregator: Aggregator) -> dict[str, tuple[int, int]]:
    """Which tensors are among the attributes, and how often each was written to."""
    return {key: (id(one), one._version) for key, one in _attributes(aggregator) if isinstance(one, Tensor)}


def _as_tensor(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    if (isinstance(value, int) and value.bit_length() < 64) or (
        isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf"
    ):
        return torch.as_tensor(value, device="cpu").clone()
    return value


def _like(current: Any, value: Any) -> Any:
    """The value as what is there now: on its device, or as a number or an array."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(current, Tensor):
        return value.to(current.device, copy=True)
    if isinstance(current, np.ndarray):
        return value.cpu().numpy().copy()
    if isinstance(current, (int, float, np.generic)):
        return type(current)(value.item())
    return value.clone()


def _same(value: Any, other: Any, written: bool) -> bool:
    """Whether a number, tensor or array has not changed; others count as unchanged.

    One of an accelerator, which the host does not wait for, has changed if it was ``written`` to.
    """
    if not isinstance(value, Tensor):
        return True
    if not is_host(value.device):
        return not written
    return isinstance(other, Tensor) and value.dtype == other.dtype and torch.equal(value, other)
