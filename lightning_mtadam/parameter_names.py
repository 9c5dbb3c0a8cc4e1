"""The names of an optimizer's parameters and groups: kept with what they belong to, and refused where given twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor

from lightning_mtadam.terms import PLACEHOLDER, clean_names

Group: TypeAlias = dict[str, Any]


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
