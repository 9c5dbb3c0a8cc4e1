"""Which parameters form a layer, the unit that is balanced, and what the layers are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam.optim.options import LayerRule

PLACEHOLDER = "parameter_"


@dataclass(frozen=True)
class Layers:
    """The layers of an optimizer's parameters.

    Attributes:
        names: L names, in the order of their first parameter.
        layer_of: [P] int64, the layer of each parameter.
    """

    names: tuple[str, ...]
    layer_of: Tensor


class LayerBook:
    """The names of an optimizer's parameters, and the layers that follow from them; both may become known late.

    Args:
        rule: what forms a layer.
    """

    def __init__(self, rule: LayerRule) -> None:
        self.rule = rule
        self.names: list[str | None] = []
        self._layers: Layers | None = None

    def add(self, group: Mapping[str, Any]) -> None:
        """Note the parameters of a new group."""
        names = group.get("param_names", [PLACEHOLDER] * len(group["params"]))
        self.names += [None if name.startswith(PLACEHOLDER) else name for name in clean_names(names)]
        self._layers = None

    def name(self, named_parameters: Iterable[tuple[str, Tensor]], parameters: Sequence[Tensor]) -> None:
        """Name those of ``parameters`` that have no name yet."""
        if None in self.names:
            named = list(named_parameters)
            names = clean_names([name for name, _ in named])
            known = {id(parameter): name for name, (_, parameter) in zip(names, named, strict=True)}
            self.names = [name or known.get(id(p)) for name, p in zip(self.names, parameters, strict=True)]
            self._layers = None

    @property
    def labels(self) -> list[str]:
        """The parameters' names, or their numbers."""
        return [name or f"{PLACEHOLDER}{index}" for index, name in enumerate(self.names)]

    def layers(self, groups: Sequence[Mapping[str, Any]]) -> Layers:
        """The layers of the groups' parameters."""
        if self._layers is None:
            group_names = [
                group.get("name", f"group_{index}") for index, group in enumerate(groups) for _ in group["params"]
            ]
            device = next(parameter.device for group in groups for parameter in group["params"])
            self._layers = resolve_layers(self.rule, self.names, group_names, device)
        return self._layers


def clean_names(names: Sequence[str]) -> list[str]:
    """Names without what ``torch.compile`` puts into them, and ``DistributedDataParallel`` before all of them."""
    names = [name.replace("_orig_mod.", "") for name in names]
    wrapped = all(name.startswith(("module.", PLACEHOLDER)) for name in names)
    return [name.removeprefix("module.") for name in names] if wrapped else names


def named_alike(group: Mapping[str, Any], known: int) -> dict[str, Any]:
    """Give a group without names placeholders for them: torch wants all groups of an optimizer alike.

    Args:
        group: a new parameter group, e.g. of a fine-tuning callback.
        known: the number of parameters that the optimizer has.
    """
    members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if not any(isinstance(member, tuple) for member in members):
        members = [(f"{PLACEHOLDER}{known + index}", parameter) for index, parameter in enumerate(members)]
    return {**group, "params": members}


def resolve_layers(
    rule: LayerRule, parameter_names: Sequence[str | None], groups: Sequence[str], device: torch.device
) -> Layers:
    """Apply the rule to the parameters.

    Args:
        rule: "parameter", "module", "group", "global", or a callable from a parameter's name to its layer's name.
        parameter_names: [P]; ``None`` where a name is not known.
        groups: [P], the name of each parameter's group.
        device: where to keep the index.

    Raises:
        ValueError: the rule needs names that are not known, or two parameters have one name.
        TypeError: the callable returned no string.
    """
    known = [name for name in parameter_names if name is not None]
    if rule not in ("group", "global") and len(set(known)) != len(known):
        twice = next(name for name in known if known.count(name) > 1)
        raise ValueError(f"Two parameters are named {twice!r}. Give them different names, e.g. a prefix per network.")
    owners = zip(parameter_names, groups, strict=True)
    labels = [_label(rule, index, name, group) for index, (name, group) in enumerate(owners)]
    names = tuple(dict.fromkeys(labels))
    position = {name: index for index, name in enumerate(names)}
    return Layers(names, torch.tensor([position[label] for label in labels], device=device))


def _label(rule: LayerRule, index: int, name: str | None, group: str) -> str:
    if rule == "global":
        return "global"
    if rule == "group":
        return group
    if rule == "parameter":
        return f"{PLACEHOLDER}{index}" if name is None else name
    if name is None:
        raise ValueError(
            f"layers={rule!r} needs the parameters' names. Pass model.named_parameters() instead of"
            " model.parameters(), or use layers='parameter'."
        )
    if rule == "module":
        return name.rpartition(".")[0] or "root"
    assert callable(rule)
    label = rule(name)
    if not isinstance(label, str):
        raise TypeError(f"layers must return a layer's name, but returned {label!r} for the parameter {name!r}.")
    return label
