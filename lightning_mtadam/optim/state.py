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
    shapes: dict[str, tuple[int, ...]] = {
        "step": (1 + terms,),
        "exp_avg": (first, *shape) if options.denominator == "own" else shape,
        "exp_avg_sq": (second, *shape),
        "gradient_norm": (terms,),
        "gradient_norm_count": (terms,),
        **dict.fromkeys(AVERAGE_KEYS, (terms,)),
    }
    if amsgrad:
        shapes["max_exp_avg_sq"] = (second, *shape)
    return shapes


def new_state(parameter: Tensor, options: Options, terms: int, *, amsgrad: bool) -> State:
    """The state before the first step: all zero, on the parameter's device, the moments sharded as the parameter is."""
    wide = wide_dtype([parameter])
    return {
        key: torch.zeros(shape, dtype=wide, device=parameter.device)
        if key in BALANCE_KEYS
        else sharding.zeros(shape, parameter.dtype, parameter)
        for key, shape in expected_shapes(parameter, options, terms, amsgrad=amsgrad).items()
    }


def allocate(state: dict[Tensor, State], groups: Groups, needed: Sequence[bool], options: Options, terms: int) -> None:
    """Make the state of those parameters that need one and have none.

    Args:
        state: the optimizer's state, by parameter.
        groups: its parameter groups.
        needed: per parameter.
        options: the optimizer's options.
        terms: their number.
    """
    owners = [(parameter, group) for group in groups for parameter in group["params"]]
    for (parameter, group), wanted in zip(owners, needed, strict=True):
        if wanted and not state.get(parameter):
            state[parameter] = new_state(parameter, options, terms, amsgrad=group["amsgrad"])


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
        if loaded:
            for key in AVERAGE_KEYS:
                state[parameter].setdefault(key, torch.zeros_like(state[parameter]["gradient_norm"]))


def join_moments(states: Sequence[State], key: str, leading: int, sizes: Sequence[int]) -> Tensor:
    """One flat tensor of the moments of all these states, which become views into it: [R, elements].

    Args:
        states: of parameters that lie side by side.
        key: the moment's.
        leading: R, the moments there are of each element.
        sizes: the parameters' numbers of elements.
    """
    if len(states) == 1:
        states[0][key] = states[0][key].contiguous()
        return sharding.local(states[0][key]).view(leading, sizes[0])
    rows = [state[key].reshape(leading, size) for state, size in zip(states, sizes, strict=True)]
    if _lie_side_by_side(rows, sum(sizes)):
        return rows[0].as_strided((leading, sum(sizes)), (sum(sizes), 1))
    joined = torch.cat(rows, 1)
    for state, piece in zip(states, torch.split(joined, list(sizes), 1), strict=True):
        state[key] = piece.view(state[key].shape)
    return joined


def _lie_side_by_side(rows: Sequence[Tensor], width: int) -> bool:
    """Whether these are the columns of one tensor, one after the other, as after an earlier call."""
    memory, place = rows[0].untyped_storage().data_ptr(), rows[0].storage_offset()
    for row in rows:
        if (row.untyped_storage().data_ptr(), row.storage_offset()) != (memory, place):
            return False
        if len(row) > 1 and row.stride(0) != width:
            return False
        place += row.shape[1]
    return True


def check_checkpoint(
    state_dict: Mapping[str, Any],
    groups: Groups,
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


def _check_names(groups: Groups, saved_groups: Groups) -> None:
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
    groups: Groups,
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
