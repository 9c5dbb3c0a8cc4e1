"""The optimizer's state per parameter: what it holds, how it is made, checked against a checkpoint, and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.collect.norms import wide_dtype
from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim.options import Options
from lightning_mtadam.terms import clean_names

State: TypeAlias = dict[str, Any]
Groups: TypeAlias = Sequence[Mapping[str, Any]]

AVERAGE_KEYS = ("log_scale", "log_scale_count")
"""The entries of the scales' average over the run; checkpoints from before it was kept lack them."""

BALANCE_KEYS = ("step", "gradient_norm", "gradient_norm_count", *AVERAGE_KEYS)
"""Small entries that are kept in fp32 or better. They are equal for all parameters of a layer, but for "step"."""


def expected_shapes(parameter: Tensor, options: Options, terms: int, *, amsgrad: bool) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a parameter's state, for I terms.

    Returns:
        ``step`` [1 + I]: the parameter's clock, then each term's; ``exp_avg``: the merged first moment over
        the number of second moments, or one per term with denominator "own"; ``exp_avg_sq`` [I, *shape], or [1, *shape]
        with denominator "sum": the second moments, their bias already corrected;
        ``max_exp_avg_sq`` with amsgrad, not corrected; ``gradient_norm`` and ``gradient_norm_count`` [I]: the moving
        averages of the layer's norms; ``log_scale`` and ``log_scale_count`` [I]: the mean logarithm of the layer's
        scales, and over how many steps.
    """
    shape = tuple(parameter.shape)
    first, second = options.moments(terms)
    return {
        "step": (1 + terms,),
        "exp_avg": (first, *shape) if options.denominator == "own" else shape,
        "exp_avg_sq": (second, *shape),
        **dict.fromkeys(BALANCE_KEYS[1:], (terms,)),
        **({"max_exp_avg_sq": (second, *shape)} if amsgrad else {}),
    }


def allocate(state: dict[Tensor, State], groups: Groups, needed: Sequence[bool], options: Options, terms: int) -> None:
    """Make the state of those parameters that need one and have none.

    All is zero, on the parameter's device, the moments sharded as the parameter is.
    """
    owners = [(parameter, group) for group in groups for parameter in group["params"]]
    for (parameter, group), wanted in zip(owners, needed, strict=True):
        if wanted and not state.get(parameter):
            wide, device = wide_dtype([parameter]), parameter.device
            shapes = expected_shapes(parameter, options, terms, amsgrad=group["amsgrad"])
            state[parameter] = {
                key: torch.zeros(shape, dtype=wide, device=device)
                if key in BALANCE_KEYS
                else sharding.zeros(shape, parameter.dtype, parameter)
                for key, shape in shapes.items()
            }


def restore(state: dict[Tensor, State], groups: Groups, state_dict: Mapping[str, Any]) -> None:
    """Copy a checkpoint's tensors, in the dtypes they are kept in.

    ``Optimizer.load_state_dict`` would cast norms to the parameter's dtype, and share memory with the checkpoint.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        loaded = state_dict["state"].get(index, {})
        for key, saved in loaded.items():
            if key in BALANCE_KEYS:
                state[parameter][key] = saved.to(parameter.device, wide_dtype([parameter]), copy=True)
            else:
                placed = sharding.place(saved.to(parameter.device), parameter)
                state[parameter][key] = placed.to(parameter.dtype, copy=True)
        for key in AVERAGE_KEYS if loaded else ():
            state[parameter].setdefault(key, torch.zeros_like(state[parameter]["gradient_norm"]))


def join_moments(states: Sequence[State], key: str, leading: int, sizes: Sequence[int]) -> Tensor:
    """One flat tensor of the moments of parameters that lie side by side; their states get views into it.

    Args:
        states: of the parameters.
        key: the moment's.
        leading: R, the moments there are of each element.
        sizes: the parameters' numbers of elements.

    Returns:
        [R, elements].
    """
    if len(states) == 1:
        states[0][key] = states[0][key].contiguous()
        return sharding.local(states[0][key]).view(leading, sizes[0])
    rows, width = [state[key].reshape(leading, size) for state, size in zip(states, sizes, strict=True)], sum(sizes)
    memory, place = rows[0].untyped_storage().data_ptr(), rows[0].storage_offset()
    for row in rows:
        if (row.untyped_storage().data_ptr(), row.storage_offset()) != (memory, place) or (
            leading > 1 and row.stride(0) != width
        ):
            break
        place += row.shape[1]
    else:  # they are joined already
        return rows[0].as_strided((leading, width), (width, 1))
    joined = torch.cat(rows, 1)
    for state, piece in zip(states, torch.split(joined, list(sizes), 1), strict=True):
        state[key] = piece.view(state[key].shape)
    return joined


def check_checkpoint(
    state_dict: Mapping[str, Any], groups: Groups, names: Sequence[str], options: Options, terms: tuple[str, ...]
) -> None:
    """Raise ``ValueError`` unless ``state_dict`` fits the optimizer, naming what differs.

    Args:
        state_dict: what ``MTAdam.state_dict`` gave.
        groups: the optimizer's parameter groups.
        names: the parameters' names, in order.
        options: the optimizer's options.
        terms: the optimizer's terms; empty if they are not known yet.
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
    for group, saved in zip(groups, saved_groups, strict=True):
        if "param_names" in group and "param_names" in saved:
            _check_names(clean_names(group["param_names"]), clean_names(saved["param_names"]))
    saved_terms = tuple(saved_groups[0]["terms"])
    if saved_terms and terms and saved_terms != terms:
        _refuse_terms(saved_terms, terms)
    for option, value in options.state_meaning.items():
        saved = saved_groups[0][option]
        if saved != value:
            raise ValueError(
                f"The checkpoint was written with {option}={saved!r}, the optimizer has {option}={value!r}."
                f" Its numbers mean something else. Use MTAdam(..., {option}={saved!r}), or start anew."
            )
    parameters = [parameter for group in groups for parameter in group["params"]]
    owners = [(state_dict["state"].get(index), group) for group in saved_groups for index in group["params"]]
    for (state, group), name, parameter in zip(owners, names, parameters, strict=True):
        shapes = expected_shapes(parameter, options, len(saved_terms), amsgrad=group["amsgrad"])
        for key, shape in () if state is None else shapes.items():
            if key in state or key not in AVERAGE_KEYS:
                _check_entry(state.get(key), key, shape, name)


def _check_names(names: Sequence[str], saved_names: Sequence[str]) -> None:
    for name, saved in zip(names, saved_names, strict=True):
        if name != saved:
            raise ValueError(
                f"The checkpoint has the parameter {saved!r} where the optimizer has {name!r}. Give the optimizer its"
                " parameters in the order they had when the checkpoint was written."
            )


def _refuse_terms(saved: tuple[str, ...], terms: tuple[str, ...]) -> None:
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


def _check_entry(value: object, key: str, shape: tuple[int, ...], name: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"The checkpoint has no {key!r} for the parameter {name!r}.")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"The checkpoint's {key!r} of the parameter {name!r} has shape {tuple(value.shape)}, but {shape} is"
            " needed: the parameter had another shape. Load it into the network it was written with."
        )
