"""Which parameters form a layer, the unit that is balanced, and what the layers are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.parameter_names import ParameterNames, group_names, refuse_twice

LayerRule: TypeAlias = str | Callable[[str], str]

LAYER_RULES = ("parameter", "module", "group", "global")


@dataclass(frozen=True, eq=False)
class Layers:
    """The layers of an optimizer's parameters: L names, in the order of their first parameter."""

    names: tuple[str, ...]
    layer_of: Tensor  # [P] int64, the layer of each parameter


class LayerNames(ParameterNames):
    """The names of an optimizer's parameters, and the layers that follow from them, once ``found``."""

    def __init__(self, rule: LayerRule) -> None:
        super().__init__()
        self.rule = rule

    def check(self, known: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise if what layers are called by is given twice."""
        if self.rule == "group":
            refuse_twice("parameter groups", group_names(groups))
        elif self.rule != "global":
            refuse_twice("parameters", known)

    def layers(self, groups: Sequence[Mapping[str, Any]]) -> Layers:
        """The layers of the groups' parameters; raises if the rule needs names that are not known, or not unique."""
        if self.found is None:
            self.check([name for name in self.names if name is not None], groups)
            owners = [name for name, group in zip(group_names(groups), groups, strict=True) for _ in group["params"]]
            labels = [label_of(self.rule, *one) for one in zip(self.labels, self.names, owners, strict=True)]
            names = tuple(dict.fromkeys(labels))
            position = {name: index for index, name in enumerate(names)}
            device = self.parameters[0].device if self.parameters else None
            self.found = Layers(
                names, torch.tensor([position[label] for label in labels], dtype=torch.int64, device=device)
            )
        found: Layers = self.found
        return found


def label_of(rule: LayerRule, label: str, name: str | None, group: str) -> str:
    """The layer of a parameter: ``label`` is its name or number, ``name`` its name if known, ``group`` its group."""
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
