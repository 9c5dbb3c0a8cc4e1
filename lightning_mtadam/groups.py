"""An optimizer's parameters and groups as its user changes them: taken over and made complete, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import chain
from numbers import Real
from operator import is_, itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.optim import Optimizer

from lightning_mtadam.schedule import COUNTED
from lightning_mtadam.terms import PLACEHOLDER, clean_names, plain

Group: TypeAlias = dict[str, Any]

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


class ParameterNames:
    """The names of an optimizer's parameters. A name belongs to its parameter, wherever that stands.

    Attributes:
        groups: the parameter groups, as they were last followed.
        parameters: of all groups, in order.
        names: theirs, ``None`` where not known.
        seen: the identities of groups and parameters.
        found: what was made of all this; ``None`` once it changes.
        strict: whether what is given twice is refused when it comes; :meth:`check` says what that is.
    """

    def __init__(self) -> None:
        self.groups: list[Any] = []
        self.parameters: list[Tensor] = []
        self.names: list[str | None] = []
        self.seen: list[int] = []
        self.found: Any = None
        self.strict = False
        self._known: dict[Tensor, str] = {}

    def add(self, group: Mapping[str, Any]) -> None:
        """Note the parameters of one more group."""
        self.follow([*self.groups, group])

    def follow(self, groups: Sequence[Any]) -> None:
        """Note the parameters of all groups as they are now; of what raises, nothing.

        The names of a new group count. In one that was there before, whose parameters were exchanged, they may be those
        of other parameters.
        """
        parameters, before = [one for group in groups for one in group["params"]], set(map(id, self.groups))
        known = {one: self._known[one] for one in parameters if one in self._known}
        for group in groups:
            names, new = clean_names(group.get("param_names", ())), id(group) not in before
            if len(names) != len(group["params"]):
                continue
            for one, name in zip(group["params"], names, strict=True):
                if not name.startswith(PLACEHOLDER) and (new or (one not in known and name not in known.values())):
                    known[one] = name
        if self.strict:
            self.check(list(known.values()), groups)
        self._known, self.parameters, self.groups = known, parameters, list(groups)
        if any("param_names" in group for group in groups):
            self._write_names(groups)
        self.seen = [*map(id, groups), *map(id, parameters)]
        self._list()

    def name(self, named_parameters: Iterable[tuple[str, Tensor]], parameters: Sequence[Tensor]) -> None:
        """Name those of ``parameters`` that have no name yet."""
        named = list(named_parameters)
        given = dict(zip((id(one) for _, one in named), clean_names([name for name, _ in named]), strict=True))
        self._known = {one: given[id(one)] for one in parameters if id(one) in given} | self._known
        self._list()

    @property
    def labels(self) -> list[str]:
        """The parameters' names, or their numbers."""
        return [name or f"{PLACEHOLDER}{index}" for index, name in enumerate(self.names)]

    def check(self, known: Sequence[str], groups: Sequence[Group]) -> None:
        """Raise if names that must differ do not."""

    def _write_names(self, groups: Sequence[Any]) -> None:
        """Correct what the groups say of their parameters' names, where they say nothing or it is of others."""
        at = 0
        for group in groups:
            names, size = clean_names(group.get("param_names", ())), len(group["params"])
            found = [self._known.get(one, f"{PLACEHOLDER}{at + index}") for index, one in enumerate(group["params"])]
            wrong = [name != one and not name.startswith(PLACEHOLDER) for name, one in zip(names, found, strict=False)]
            if len(names) != size or any(wrong):
                group["param_names"] = found
            at += size

    def _list(self) -> None:
        self.names = [self._known.get(one) for one in self.parameters]
        self.found = None


def group_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the groups are called: by their name, or their number."""
    return [group.get("name", f"group_{at}") for at, group in enumerate(groups)]


def refuse_twice(what: str, names: Sequence[str]) -> None:
    """Raise ``ValueError`` if a name is there twice."""
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two {what} are named {twice!r}. Give them different names, e.g. a prefix per network.")


def named_alike(group: Mapping[str, Any], known: int) -> Group:
    """Give a new group without names placeholders, after ``known`` others: torch wants all groups alike."""
    members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if "param_names" not in group and not any(isinstance(member, tuple) for member in members):
        members = [(f"{PLACEHOLDER}{known + index}", parameter) for index, parameter in enumerate(members)]
    return {"param_names": [], **group, "params": members}


@contextmanager
def naming_all(groups: list[Group], group: Group, labels: Sequence[str]) -> Iterator[None]:
    """Let a group with names be added to some without, which torch wants alike; if that fails, all is as it was.

    ``labels``: of the parameters of ``groups``.
    """
    before, rest = list(groups), iter(labels)
    unnamed = [one for one in groups if "param_names" not in one]
    try:
        if "param_names" in group or any(isinstance(one, tuple) for one in group["params"]):
            for one in unnamed:
                one["param_names"] = [next(rest) for _ in one["params"]]
        yield
    except BaseException:
        groups[:] = before
        for one in unnamed:
            one.pop("param_names", None)
        raise


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
