"""The optimizer's state per parameter: what it holds, how it is made, checked against a checkpoint, and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam import checkpoint
from lightning_mtadam.collect.norms import wide_dtype
from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim.options import Options

State: TypeAlias = dict[str, Any]
Groups: TypeAlias = Sequence[Mapping[str, Any]]

AVERAGE_KEYS = ("log_scale", "log_scale_count")  # of the scales' average; checkpoints from before it lack them
BALANCE_KEYS = ("step", "gradient_norm", "gradient_norm_count", *AVERAGE_KEYS)  # small, in fp32 or better


def expected_shapes(parameter: Tensor, options: Options, terms: int, *, amsgrad: bool) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a parameter's state, for I terms.

    ``step`` [1 + I]: the parameter's clock, then each term's; ``exp_avg``: the merged first moment over the number of
    second moments, or one per term with denominator "own"; ``exp_avg_sq`` [I, *shape], or [1, *shape] with denominator
    "sum": the second moments, their bias already corrected; ``max_exp_avg_sq`` with amsgrad, not corrected;
    ``gradient_norm`` and ``gradient_norm_count`` [I]: the moving averages of the layer's norms; ``log_scale`` and
    ``log_scale_count`` [I]: the mean logarithm of the layer's scales, and over how many steps.
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


def allocate(state: dict[Tensor, State], groups: Groups, held: Sequence[bool], options: Options, terms: int) -> None:
    """Make the state of parameters that are trained, or have a gradient ``held``: zeros, sharded as they are."""
    owners = [(parameter, group) for group in groups for parameter in group["params"]]
    for (parameter, group), has_gradient in zip(owners, [*held, *[False] * len(owners)], strict=False):
        if (has_gradient or parameter.requires_grad) and not state.get(parameter):
            wide, device = wide_dtype([parameter]), parameter.device
            shapes = expected_shapes(parameter, options, terms, amsgrad=group["amsgrad"])
            state[parameter] = {
                key: torch.zeros(shape, dtype=wide, device=device)
                if key in BALANCE_KEYS
                else sharding.zeros(shape, parameter.dtype, parameter)
                for key, shape in shapes.items()
            }


def restore(state: dict[Tensor, State], groups: Groups, state_dict: Mapping[str, Any]) -> None:
    """Copy a checkpoint's tensors, in the dtypes they are kept in: torch would cast norms, and share memory with it."""
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
    """One flat tensor [R, elements] of a moment of parameters that lie side by side; their states get views into it.

    ``leading``: R, the moments there are of each element; ``sizes``: the parameters' numbers of elements.
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
        whole: Tensor = rows[0].as_strided((leading, width), (width, 1))
        return whole
    joined = torch.cat(rows, 1)
    for state, piece in zip(states, torch.split(joined, list(sizes), 1), strict=True):
        state[key] = piece.view(state[key].shape)
    return joined


def check_checkpoint(
    state_dict: Mapping[str, Any], groups: Groups, names: Sequence[str], options: Options, terms: tuple[str, ...]
) -> None:
    """Raise ``ValueError`` unless ``state_dict`` fits the optimizer: its groups, names, options and terms."""
    saved_groups = state_dict["param_groups"]
    checkpoint.check_groups(groups, saved_groups)
    saved_terms = tuple(saved_groups[0]["terms"])
    checkpoint.check_same_terms(saved_terms, terms)
    checkpoint.check_options(saved_groups[0], options.state_meaning)
    parameters = [parameter for group in groups for parameter in group["params"]]
    owners = [(state_dict["state"].get(index), group) for group in saved_groups for index in group["params"]]
    for (state, group), name, parameter in zip(owners, names, parameters, strict=True):
        if state is not None:
            shapes = expected_shapes(parameter, options, len(saved_terms), amsgrad=group["amsgrad"])
            checkpoint.check_entries(state, shapes, AVERAGE_KEYS, name)
