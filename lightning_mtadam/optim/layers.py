"""Which parameters form a layer, the unit that is balanced, and what the layers are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam.optim.options import LayerRule
from lightning_mtadam.terms import PLACEHOLDER, clean_names


@dataclass(frozen=True, eq=False)
class Layers:
    """The layers of an optimizer's parameters: L names, in the order of their first parameter."""

    names: tuple[str, ...]
    layer_of: Tensor  # [P] int64, the layer of each parameter


class LayerNames:
    """The names of an optimizer's parameters, ``None`` where not known yet, and the layers, once ``found``."""

    def __init__(self, rule: LayerRule) -> None:
        self.rule = rule
        self.names: list[str | None] = []
        self.found: Layers | None = None

    def add(self, group: Mapping[str, Any]) -> None:
        """Note the parameters of a new group."""
        names = group.get("param_names", [PLACEHOLDER] * len(group["params"]))
        self.names += [None if name.startswith(PLACEHOLDER) else name for name in clean_names(names)]
        self.found = None

    def name(self, named_parameters: Iterable[tuple[str, Tensor]], parameters: Sequence[Tensor]) -> None:
        """Name those of ``parameters`` that have no name yet."""
        named = list(named_parameters)
        names = clean_names([name for name, _ in named])
        known = {id(parameter): name for name, (_, parameter) in zip(names, named, strict=True)}
        self.names = [name or known.get(id(p)) for name, p in zip(self.names, parameters, strict=True)]
        self.found = None

    @property
    def labels(self) -> list[str]:
        """The parameters' names, or their numbers."""
        return [name or f"{PLACEHOLDER}{index}" for index, name in enumerate(self.names)]

    def layers(self, groups: Sequence[Mapping[str, Any]]) -> Layers:
        """The layers of the groups' parameters; raises if the rule needs names that are not known, or not unique."""
        if self.found is None:
            known = [name for name in self.names if name is not None]
            if self.rule not in ("group", "global") and len(set(known)) != len(known):
                twice = next(name for name in known if known.count(name) > 1)
                raise ValueError(
                    f"Two parameters are named {twice!r}. Give them different names, e.g. a prefix per network."
                )
            owners = [group.get("name", f"group_{at}") for at, group in enumerate(groups) for _ in group["params"]]
            labels = [_label(self.rule, *one) for one in zip(self.labels, self.names, owners, strict=True)]
            names = tuple(dict.fromkeys(labels))
            position = {name: index for index, name in enumerate(names)}
            device = next(parameter.device for group in groups for parameter in group["params"])
            self.found = Layers(names, torch.tensor([position[label] for label in labels], device=device))
        return self.found


def named_alike(group: Mapping[str, Any], known: int) -> dict[str, Any]:
    """Give a new group without names placeholders, after ``known`` others: torch wants all groups alike."""
    members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if not any(isinstance(member, tuple) for member in members):
        members = [(f"{PLACEHOLDER}{known + index}", parameter) for index, parameter in enumerate(members)]
    return {**group, "params": members}


def _label(rule: LayerRule, label: str, name: str | None, group: str) -> str:
    if rule in ("global", "group", "parameter"):
        return {"global": "global", "group": group, "parameter": label}[str(rule)]
    if name is None:
        raise ValueError(
            f"layers={rule!r} needs the parameters' names. Pass model.named_parameters() instead of"
            " model.parameters(), or use layers='parameter'."
        )
    if rule == "module":
        return name.rpartition(".")[0] or "root"
    assert callable(rule)
    found = rule(name)
    if not isinstance(found, str):
        raise TypeError(f"layers must return a layer's name, but returned {found!r} for the parameter {name!r}.")
    return found
