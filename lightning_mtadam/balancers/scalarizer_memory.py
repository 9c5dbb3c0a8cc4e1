"""What a scalarizer remembers from call to call, as tensors, so that a call can be repeated and a run resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mtadam.balancers.aggregator_memory import drawing_from

Scalarizer: TypeAlias = Callable[[Tensor], Any]
"""Makes a scalar of values [I]. A type that said so would keep LightningCLI from making objects that do."""
State: TypeAlias = Mapping[str, Tensor]
_NO_STATE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Outcome:
    """What a call gave, of n terms that are present.

    Attributes:
        value: the scalar.
        weights: its gradient by the values, [n].
        learned: its gradient by each parameter that an optimizer learns, as large as the parameter.
        state: what the scalarizer remembers then.
    """

    value: Tensor
    weights: Tensor
    learned: list[Tensor]
    state: dict[str, Tensor]


class ScalarizerMemory:
    """Calls a scalarizer in a given state, on the terms that are present, and says in what state that leaves it.

    The state is that of TorchJD's scalarizers: parameters that it updates itself (it then has a method ``update``), and
    numbers, tensors, lists of tensors and an optimizer among its attributes whose names begin with an underscore. What
    has an entry for each term, a vector [I] among them and among its other tensors, is cut to the terms that are
    present; the entries of the others stay.

    Args:
        scalarizer: values [I] -> a scalar.
    """

    def __init__(self, scalarizer: Scalarizer) -> None:
        self.scalarizer: Any = scalarizer
        self.updates = callable(getattr(scalarizer, "update", None))
        named = list(scalarizer.named_parameters()) if isinstance(scalarizer, nn.Module) else []
        self._learned = [] if self.updates else [name for name, one in named if one.requires_grad]
        self._initial = {name: deepcopy(one) for name, one in self._slots() if not isinstance(one, Optimizer)}

    @property
    def learned(self) -> list[nn.Parameter]:
        """The parameters that an optimizer learns, which are others after they have moved to some devices."""
        return [self.scalarizer.get_parameter(name) for name in self._learned]

    def call(self, values: Tensor, places: Sequence[int], terms: int, state: State, seed: str) -> Outcome:
        """What the scalarizer makes of the values.

        Args:
            values: of the n terms that are present, [n].
            places: of these among the terms.
            terms: I.
            state: what the call before gave; empty for the first.
            seed: what is drawn in the call depends on it alone; no other drawing is disturbed.
        """
        leaf, learned = values.detach().clone().requires_grad_(), self.learned
        with self._at(values, places, terms, state), drawing_from(seed, values.device), torch.enable_grad():
            for parameter in learned:  # they do not by themselves, so that DistributedDataParallel lets them alone
                parameter.requires_grad_(True)
            try:
                value = self.scalarizer(leaf)
                self._check(value)
                found = torch.autograd.grad(value, [leaf, *learned], allow_unused=True)
            finally:
                for parameter in learned:
                    parameter.requires_grad_(False)
            after = self._read(places, terms, state)
        gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(found, [leaf, *learned], strict=True)]
        whole = [self._widened(gradient, places, terms, None) for gradient in gradients[1:]]
        return Outcome(value.detach(), gradients[0], whole, after)

    def update(self, values: Tensor, places: Sequence[int], terms: int, state: State) -> dict[str, Tensor]:
        """The state after the scalarizer was told the values after a step, [n], of terms that were in it."""
        with self._at(values, places, terms, state):
            self.scalarizer.update(values.detach())
            return self._read(places, terms, state)

    def end_epoch(self, like: Tensor, state: State) -> dict[str, Tensor]:
        """The state after the scalarizer's ``step``, which ends an epoch; of values like these, [I]."""
        everyone = range(len(like))
        with self._at(like, everyone, len(like), state):
            self.scalarizer.step()
            return self._read(everyone, len(like), state)

    def _check(self, value: object) -> None:
        name = type(self.scalarizer).__name__
        if not isinstance(value, Tensor) or value.dim() != 0:
            made = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"The scalarizer {name} must make a scalar tensor of the losses, but made {made}.")
        if not value.requires_grad:
            raise ValueError(f"What the scalarizer {name} makes of the losses has no graph, so it weighs none of them.")

    def _slots(self) -> Iterator[tuple[str, Any]]:
        """What may be part of the state, by name; values that are never are passed over when they are read."""
        yield from ((name, one) for name, one in self._attributes() if name[:1] == "_" and name not in _NO_STATE)
        if self.updates and isinstance(self.scalarizer, nn.Module):
            yield from self.scalarizer.named_parameters(recurse=False)

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        """All attributes and buffers, by name."""
        yield from list(getattr(self.scalarizer, "__dict__", {}).items())
        if isinstance(self.scalarizer, nn.Module):
            yield from self.scalarizer.named_buffers(recurse=False)

    @contextmanager
    def _at(self, values: Tensor, places: Sequence[int], terms: int, state: State) -> Iterator[None]:
        """The scalarizer in a state, cut to some of the terms; then as it was, but for its state."""
        slots, others = {name for name, _ in self._slots()}, {}
        for name, value in self._attributes():
            if isinstance(value, Tensor) and name not in slots:
                others[name] = value
                setattr(self.scalarizer, name, _cut(value.to(values.device), places, terms))
        whole = [parameter.data for parameter in self.learned]
        for parameter in self.learned:
            parameter.data = _cut(parameter.data, places, terms)
        try:
            self._write(values, places, terms, state)
            yield
        finally:
            for name, value in others.items():
                setattr(self.scalarizer, name, value)
            for parameter, data in zip(self.learned, whole, strict=True):
                parameter.data = data

    def _write(self, values: Tensor, places: Sequence[int], terms: int, state: State) -> None:
        """Put a state in place; what it has no entry for is as it was at first."""
        self._move(values.device)
        if any(".0." in key for key in state) and not any(isinstance(one, Optimizer) for _, one in self._slots()):
            self._write(values, places, terms, {key: value for key, value in state.items() if ".0." not in key})
            self.scalarizer(torch.ones_like(values))  # which makes its optimizer with the first update
            self.scalarizer.update(torch.ones_like(values))

        def placed(value: Tensor) -> Tensor:
            if value.dim() == 0:  # a number, which is the host's
                return value.clone()
            wide = values.dtype if value.is_floating_point() else value.dtype
            return _cut(value.detach().to(values.device, wide, copy=True), places, terms)

        for name, current in list(self._slots()):
            initial = self._initial.get(name)
            entries = {key: value for key, value in state.items() if key == name or key.startswith(f"{name}.")}
            if isinstance(current, nn.Parameter):
                current.data = placed(entries[name] if entries else cast(Tensor, initial))
            elif isinstance(current, Optimizer) and entries:
                for index, parameter in enumerate(current.param_groups[0]["params"]):
                    start = f"{name}.{index}."
                    found = {key.removeprefix(start): one for key, one in entries.items() if key.startswith(start)}
                    current.state[parameter] = {key: placed(one) for key, one in found.items()}
            elif not entries:
                setattr(self.scalarizer, name, placed(initial) if isinstance(initial, Tensor) else deepcopy(initial))
            elif isinstance(initial, list):
                setattr(self.scalarizer, name, [placed(entries[f"{name}.{at}"]) for at in range(len(entries))])
            elif isinstance(initial, (int, float)):
                setattr(self.scalarizer, name, type(initial)(entries[name].item()))
            else:
                setattr(self.scalarizer, name, placed(entries[name]))

    def _move(self, device: torch.device) -> None:
        """Move the parameters, which may become others; then its optimizer is made anew, with the state it had."""
        if self.updates and any(one.device != device for one in self.scalarizer.parameters()):
            self.scalarizer.to(device)
            for name, value in list(self._slots()):
                if isinstance(value, Optimizer):
                    setattr(self.scalarizer, name, None)

    def _read(self, places: Sequence[int], terms: int, before: State) -> dict[str, Tensor]:
        """The state that the scalarizer is in, with what was before of the terms that are not present."""
        found: dict[str, Tensor] = {}
        for name, value in self._slots():
            for key, one in _entries(name, value):
                known = before.get(key, self._initial.get(name))
                found[key] = self._widened(one, places, terms, known if isinstance(known, Tensor) else None)
        return found

    def _widened(self, value: Tensor, places: Sequence[int], terms: int, before: Tensor | None) -> Tensor:
        """What has an entry for each term that is present with one for each of all: those of the others are kept."""
        if len(places) == terms or value.shape != (len(places),):
            return value.detach().clone()
        whole = value.new_zeros(terms) if before is None else before.to(value, copy=True)
        whole = whole.detach()
        whole[list(places)] = value.detach()
        return whole


def _cut(value: Tensor, places: Sequence[int], terms: int) -> Tensor:
    return value[list(places)] if value.shape == (terms,) and len(places) < terms else value


def _entries(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a value of the state is kept as."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        dtype = torch.float64 if isinstance(value, float) else torch.int64
        yield name, torch.tensor(value, dtype=dtype, device="cpu")
    elif isinstance(value, list):
        yield from ((f"{name}.{at}", one) for at, one in enumerate(value) if isinstance(one, Tensor))
    elif isinstance(value, Optimizer):
        for at, parameter in enumerate(value.param_groups[0]["params"]):
            found = value.state.get(parameter, {})
            yield from ((f"{name}.{at}.{key}", one) for key, one in found.items() if isinstance(one, Tensor))
