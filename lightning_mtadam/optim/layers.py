"""Which parameters form a layer, the unit that is balanced, and what the layers are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mtadam.optim.options import LayerRule


@dataclass(frozen=True)
class Layers:
    """The layers of an optimizer's parameters.

    Attributes:
        names: L names, in the order of their first parameter.
        layer_of: [P] int64, the layer of each parameter.
    """

    names: tuple[str, ...]
    layer_of: Tensor


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
    labels = [_label(rule, index, name, group) for index, (name, group) in enumerate(zip(parameter_names, groups))]  # noqa: B905
    if rule == "parameter" and len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"Two parameters are named {twice!r}. Give them different names, e.g. a prefix per network.")
    names = tuple(dict.fromkeys(labels))
    position = {name: index for index, name in enumerate(names)}
    return Layers(names, torch.tensor([position[label] for label in labels], device=device))


def _label(rule: LayerRule, index: int, name: str | None, group: str) -> str:
    if rule == "global":
        return "global"
    if rule == "group":
        return group
    if rule == "parameter":
        return f"parameter_{index}" if name is None else name
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
