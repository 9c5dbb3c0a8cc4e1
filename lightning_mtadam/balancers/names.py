"""Finds parts of a network by their names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn


def near_matches(name: str, known: Iterable[str]) -> list[str]:
    """Up to three names like this one; any three if there is none."""
    names = list(filter(None, known))
    return difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]


def module_of(model: nn.Module, name: str, option: str) -> nn.Module:
    """The module of this name.

    Args:
        model: the network.
        name: as in ``model.named_modules()``.
        option: what it was given as.

    Raises:
        ValueError: there is none, with near matches.

    Example:
        >>> module_of(nn.Sequential(nn.Linear(2, 3)), "0", "output")
        Linear(in_features=2, out_features=3, bias=True)
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not name or name not in modules:
        raise ValueError(
            f"{option}={name!r} names no module of {type(model).__name__}. Near matches:"
            f" {near_matches(name, modules)}. model.named_modules() lists the names."
        )
    return modules[name]
