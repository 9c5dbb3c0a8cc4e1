"""Checks a checkpoint against the optimizer before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_mtadam.optim.layers import clean_names
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.state import AVERAGE_KEYS, expected_shapes


def check_checkpoint(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    options: Options,
    terms: tuple[str, ...],
) -> None:
    """Raise unless ``state_dict`` fits the optimizer, naming what differs.

    Args:
        state_dict: what ``MTAdam.state_dict`` gave.
        groups: the optimizer's parameter groups.
        names: the parameters' names, in order.
        options: the optimizer's options.
        terms: the optimizer's terms; empty if they are not known yet.

    Raises:
        ValueError: other groups, parameters, terms, shapes or options, or no checkpoint of MTAdam.
    """
    saved_groups = state_dict["param_groups"]
    if any("terms" not in group for group in saved_groups):
        raise ValueError("The checkpoint was not written by MTAdam: its parameter groups name no terms.")
    sizes, saved_sizes = ([len(group["params"]) for group in found] for found in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(
            f"The checkpoint has parameter groups of {saved_sizes} parameters, the optimizer of {sizes}."
            " Give the optimizer the parameters that it had when the checkpoint was written."
        )
    _check_names(groups, saved_groups)
    saved_terms = tuple(saved_groups[0]["terms"])
    _check_terms(saved_terms, terms)
    for option, value in options.state_meaning.items():
        saved = saved_groups[0][option]
        if saved != value:
            raise ValueError(
                f"The checkpoint was written with {option}={saved!r}, the optimizer has {option}={value!r}."
                f" Its numbers mean something else. Use MTAdam(..., {option}={saved!r}), or start anew."
            )
    _check_shapes(state_dict, groups, names, options, saved_terms)


def _check_names(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    for group, saved in zip(groups, saved_groups, strict=True):
        if "param_names" in group and "param_names" in saved:
            ours, theirs = clean_names(group["param_names"]), clean_names(saved["param_names"])
            for name, saved_name in zip(ours, theirs, strict=True):
                if name != saved_name:
                    raise ValueError(
                        f"The checkpoint has the parameter {saved_name!r} where the optimizer has {name!r}. Give the"
                        " optimizer its parameters in the order they had when the checkpoint was written."
                    )


def _check_terms(saved: tuple[str, ...], terms: tuple[str, ...]) -> None:
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


def _check_shapes(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    options: Options,
    terms: tuple[str, ...],
) -> None:
    parameters = [parameter for group in groups for parameter in group["params"]]
    owners = [(index, group) for group in state_dict["param_groups"] for index in group["params"]]
    for (index, group), name, parameter in zip(owners, names, parameters, strict=True):
        state = state_dict["state"].get(index)
        if state is None:
            continue
        for key, shape in expected_shapes(parameter, options, len(terms), amsgrad=group["amsgrad"]).items():
            if key in state or key not in AVERAGE_KEYS:
                _check_entry(state.get(key), key, shape, name)


def _check_entry(value: object, key: str, shape: tuple[int, ...], name: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"The checkpoint has no {key!r} for the parameter {name!r}.")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"The checkpoint's {key!r} of the parameter {name!r} has shape {tuple(value.shape)}, but {shape} is"
            " needed: the parameter had another shape. Load it into the network it was written with."
        )
