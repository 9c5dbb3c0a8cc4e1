"""What an optimizer's checkpoint must agree on, and the errors that name what differs. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_mtadam.terms import clean_names


def check_groups(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` unless the parameter groups hold the same parameters, and are MTAdam's."""
    if any("terms" not in group for group in saved_groups):
        raise ValueError("The checkpoint was not written by MTAdam: its parameter groups name no terms.")
    sizes, saved_sizes = ([len(group["params"]) for group in found] for found in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(
            f"The checkpoint has parameter groups of {saved_sizes} parameters, the optimizer of {sizes}."
            " Give the optimizer the parameters that it had when the checkpoint was written."
        )
    for group, saved in zip(groups, saved_groups, strict=True):
        if "param_names" in group and "param_names" in saved:
            ours, theirs = clean_names(group["param_names"]), clean_names(saved["param_names"])
            for name, saved_name in zip(ours, theirs, strict=True):
                if name != saved_name:
                    raise ValueError(
                        f"The checkpoint has the parameter {saved_name!r} where the optimizer has {name!r}. Give the"
                        " optimizer its parameters in the order they had when the checkpoint was written."
                    )


def check_same_terms(saved: tuple[str, ...], terms: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless the terms are the same in the same order; empty ones are not known yet."""
    if not saved or not terms or saved == terms:
        return
    missing = [name for name in terms if name not in saved]
    unknown = [name for name in saved if name not in terms]
    difference = [
        *([f"it lacks {missing}"] if missing else []),
        *([f"it has {unknown}, which the optimizer has not"] if unknown else []),
    ] or ["the order differs"]
    raise ValueError(
        f"The checkpoint has the terms {saved}, the optimizer {terms}: {' and '.join(difference)}."
        f" Train with the checkpoint's terms, MTAdam(..., terms={saved}), or start anew."
    )


def check_options(saved: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the options that say what the numbers mean are the same."""
    for option, value in options.items():
        if saved[option] != value:
            raise ValueError(
                f"The checkpoint was written with {option}={saved[option]!r}, the optimizer has {option}={value!r}."
                f" Its numbers mean something else. Use MTAdam(..., {option}={saved[option]!r}), or start anew."
            )


def check_entries(
    state: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], optional: Collection[str], name: str
) -> None:
    """Raise ``ValueError`` unless a parameter's state has tensors of these shapes; ``name``: the parameter's."""
    for key, shape in shapes.items():
        value = state.get(key)
        if value is None and key in optional:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"The checkpoint has no {key!r} for the parameter {name!r}.")
        if tuple(value.shape) != shape:
            raise ValueError(
                f"The checkpoint's {key!r} of the parameter {name!r} has shape {tuple(value.shape)}, but {shape} is"
                " needed: the parameter had another shape. Load it into the network it was written with."
            )
