"""An optimizer's parameters and groups as its user changes them: taken over and made complete, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import chain
from numbers import Real
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.optim import Optimizer

from lightning_mtadam.parameter_names import Group, ParameterNames, named_alike, naming_all
from lightning_mtadam.terms import plain

COUNTED: Mapping[str, Any] = {"steps": 0, "measured": (), "awaited": ()}
"""What is counted of the whole optimizer, as it begins, in tuples, which every kind of checkpoint takes.

The steps; of each term the last step in which it was measured; of one that came too late in its step to be measured,
until which step it is waited for.
"""

_KIND = attrgetter("dtype", "shape")
_PARAMS = itemgetter("params")


class GroupsOptimizer(Optimizer):
    """An optimizer that takes over groups as they are now: also those that were assigned, replaced or changed."""

    _layer_names: ParameterNames

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Name the parameters that have no name yet, as ``model.named_parameters()`` does."""
        parameters = self._parameters()
        if None in self._layer_names.names:
            self._layer_names.name(named_parameters, parameters)

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as for every torch optimizer; with or without names, whatever the others have."""
        self._parameters()
        groups, group, labels = self.param_groups, param_group, self._layer_names.labels
        if not isinstance(group["params"], (Tensor, set)):  # torch refuses a set, which has no order
            group["params"] = list(group["params"])
        if any("param_names" in one for one in groups):
            group = named_alike(group, len(labels))
        with naming_all(groups, group, labels):
            super().add_param_group(group)
            self._check_group(group)
            self._parameters()

    def _parameters(self) -> list[Tensor]:
        """What is trained, in all groups as they are now."""
        names, groups = self._layer_names, self.param_groups
        try:
            seen = [*map(id, groups), *map(id, chain.from_iterable(map(_PARAMS, groups)))]
        except (KeyError, TypeError):  # of what is no group
            seen = []
        if seen != names.seen:
            self._follow_groups()
        return names.parameters

    def _follow_groups(self) -> None:
        names, groups = self._layer_names, self.param_groups
        complete_groups(groups, names.groups, self.defaults, self._check_group)
        parameters = [parameter for group in groups for parameter in group["params"]]
        if self._holds_gradients():
            refuse_unless_appended(names.parameters, parameters)
        before = len(names.parameters)
        names.follow(groups)
        for gone in self.state.keys() - set(parameters):
            del self.state[gone]
        self._take_in(len(parameters) - before)

    def _check_group(self, group: Group) -> None:
        """Raise unless the values of a complete group are in range."""
        raise NotImplementedError

    def _holds_gradients(self) -> bool:
        """Whether gradients of the parameters, as they were, are held."""
        raise NotImplementedError

    def _take_in(self, count: int) -> None:
        """Do what is to be done with so many new parameters."""
        raise NotImplementedError


def complete_groups(
    groups: Sequence[Group], before: Sequence[Group], defaults: Group, check: Callable[[Group], None]
) -> None:
    """Give groups that are new what they lack: options their defaults; and all the same numbers of what is counted.

    Args:
        groups: as they are now.
        before: as they were; what is counted is taken from these.
        defaults: of all that a group has, but for its parameters.
        check: raises unless the values of a complete group are in range.

    Raises:
        ValueError: there is no group, a group has no parameters' list, or a parameter is in two.
        TypeError: a group is no dict, or holds other things than tensors.
    """
    if not groups:
        raise ValueError("optimizer.param_groups is empty. Assign at least one group, {'params': [...]}.")
    for index, group in enumerate(groups):
        _check_form(index, group)
    members = [set(map(id, group["params"])) for group in groups]
    if len(set().union(*members)) < sum(map(len, members)):
        raise ValueError("A parameter is in more than one parameter group. Leave it in one of them.")
    counted: Group = {key: group[key] for group in before[:1] for key in COUNTED if key in group}
    known, terms = set(map(id, before)), defaults["terms"]
    for group in groups:
        for key, value in defaults.items():
            group.setdefault(key, value)
        group.update(counted)  # of the whole optimizer
        if not terms or not group["terms"]:  # not known here, or not when the group was written down
            group["terms"] = terms
    for group in groups:
        if id(group) not in known:
            check(group)


def begin_anew(groups: Sequence[Group]) -> None:
    """Count no steps, and no terms that were measured: of the whole optimizer, in all of its groups."""
    for group in groups:
        group.update(COUNTED)


def count(groups: Sequence[Group], before: Group, measured: Iterable[str], awaited: Mapping[str, int]) -> None:
    """Count one more step, in which these terms were ``measured``; what was counted ``before`` is kept there.

    ``awaited`` are those that could not be, and until which step they are waited for.
    """
    before.update(zip(COUNTED, itemgetter(*COUNTED)(groups[0]), strict=True))
    found: Group = {"steps": before["steps"] + 1}
    if measured or awaited or before["awaited"]:
        found["measured"] = tuple({**dict(before["measured"]), **dict.fromkeys(measured, before["steps"])}.items())
        waits = {**dict(before["awaited"]), **awaited}
        found["awaited"] = tuple(one for one in waits.items() if one[0] not in measured and one[1] > before["steps"])
    for group in groups:
        group.update(found)


def _check_form(index: int, group: object) -> None:
    where = f"optimizer.param_groups[{index}]"
    if not isinstance(group, dict):
        raise TypeError(f"{where} must be a dict, {{'params': [...]}}, but is a {type(group).__name__}.")
    if "params" not in group:
        raise ValueError(f"{where} has no 'params', but {sorted(group)}. Give it a list of parameters.")
    if not isinstance(group["params"], list) or not all(isinstance(one, Tensor) for one in group["params"]):
        raise TypeError(
            f"{where}['params'] must be a list of parameters, but is {_kind(group['params'])}. Write [*parameters];"
            " names stand in 'param_names', or are given by add_param_group."
        )


def _kind(params: object) -> str:
    if isinstance(params, list):
        return f"a list with a {next(type(one).__name__ for one in params if not isinstance(one, Tensor))}"
    return f"a {type(params).__name__}"


def refuse_unless_appended(before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
    """Raise ``RuntimeError`` unless what was there is as it was, with more after it or not."""
    if len(now) < len(before) or not all(map(is_, before, now)):
        raise RuntimeError(
            "optimizer.param_groups has changed between backward() and step(), and what was collected is of the groups"
            " before. Change them before backward(), or call zero_grad() first; to add parameters in between, use"
            " add_param_group()."
        )


def materialized(parameters: list[Tensor]) -> list[Tensor]:
    """The parameters; in place of those that have no shape yet, a tensor without elements that is not trained."""
    if UninitializedParameter not in map(type, parameters):
        return parameters
    return [torch.empty(0, device=one.device, dtype=one.dtype) if is_lazy(one) else one for one in parameters]


def identity_of(
    parameters: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]], keys: Sequence[str]
) -> tuple[object, list[Tensor | None]]:
    """What tells parameters, and their states under these keys, from others in their place; and those states."""
    found = [one.get(key) for one in state.values() for key in keys]
    return (list(map(id, parameters)), list(map(id, found)), list(map(_KIND, filter(state.get, parameters)))), found


def drop_misfits(state: MutableMapping[Tensor, Any], named: Iterable[tuple[str, Tensor]]) -> bool:
    """Drop the states that are of another shape or dtype than their parameters, and were not counted in yet; if any.

    Raises:
        ValueError: a parameter was changed whose state has moved. Nothing is dropped.
    """
    dropped = []
    for name, parameter in named:
        if not state.get(parameter):
            continue
        moments = state[parameter]["exp_avg_sq"]  # [V, *shape]
        shape = tuple(moments.shape[1:])
        if (shape, moments.dtype) == (tuple(parameter.shape), parameter.dtype):
            continue
        if state[parameter]["step"].any():
            raise ValueError(
                f"The parameter {name!r} is of shape {tuple(parameter.shape)} and {parameter.dtype}, but its state of"
                f" shape {shape} and {moments.dtype}: the parameter was changed after the first step. Nothing else was"
                " changed. Make the optimizer once the network has its dtype and shapes; or begin anew with"
                " optimizer.state.clear()."
            )
        dropped.append(parameter)
    for parameter in dropped:
        del state[parameter]
    return bool(dropped)


def check_numbers(group: Mapping[str, Any]) -> None:
    """Raise unless a group's numbers are in range."""
    for name in ("lr", "eps", "weight_decay"):
        value = plain(group[name])
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, but got {value!r}.")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, but got {value!r}.")
    betas = plain(group["betas"])
    if not isinstance(betas, (tuple, list)) or len(betas) != 3:
        raise ValueError(f"betas must be three numbers (beta1, beta2, beta3), but got {betas!r}.")
    for index, beta in enumerate(betas, start=1):
        if not isinstance(beta, Real) or not 0 <= float(beta) < 1:
            raise ValueError(f"beta{index} must be in [0, 1), but got {beta!r}.")
