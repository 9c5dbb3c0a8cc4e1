"""The optimizer's state per parameter: what it holds, and rows of it read and written for all parameters at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.distributed import sharding

State: TypeAlias = dict[str, Any]

BALANCE_KEYS = ("step", "gradient_norm", "gradient_norm_count")
"""Small entries that are kept in fp32 or better. They are equal for all parameters of a layer, but for "step"."""


def balance_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """The dtype of norms, scales and clocks: fp32, or wider if a parameter is."""
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def expected_shapes(parameter: Tensor, terms: int, *, own: bool, amsgrad: bool) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a parameter's state, for I terms.

    Returns:
        ``step`` [1 + I]: the parameter's clock, then each term's; ``exp_avg``: the merged first moment, or one per
        term with denominator "own"; ``exp_avg_sq`` [I, *shape]: the second moments; ``max_exp_avg_sq`` with amsgrad;
        ``gradient_norm`` and ``gradient_norm_count`` [I]: the moving averages of the layer's norms.
    """
    shape = tuple(parameter.shape)
    shapes: dict[str, tuple[int, ...]] = {
        "step": (1 + terms,),
        "exp_avg": (terms, *shape) if own else shape,
        "exp_avg_sq": (terms, *shape),
        "gradient_norm": (terms,),
        "gradient_norm_count": (terms,),
    }
    if amsgrad:
        shapes["max_exp_avg_sq"] = (terms, *shape)
    return shapes


def new_state(parameter: Tensor, terms: int, *, own: bool, amsgrad: bool) -> State:
    """The state before the first step: all zero, on the parameter's device, the moments sharded as the parameter is."""
    wide = balance_dtype([parameter])
    return {
        key: torch.zeros(shape, dtype=wide, device=parameter.device)
        if key in BALANCE_KEYS
        else sharding.zeros(shape, parameter.dtype, parameter)
        for key, shape in expected_shapes(parameter, terms, own=own, amsgrad=amsgrad).items()
    }


def allocate(
    state: dict[Tensor, State], groups: Sequence[Mapping[str, Any]], needed: Sequence[bool], terms: int, *, own: bool
) -> None:
    """Make the state of the parameters that have none and are trained, or got a gradient in this step.

    Args:
        state: the optimizer's state, by parameter.
        groups: its parameter groups.
        needed: per parameter, whether it got a gradient; may be empty.
        terms: their number.
        own: whether there is a first moment per term.
    """
    owners = [(parameter, group) for group in groups for parameter in group["params"]]
    for (parameter, group), reached in zip(owners, needed or [False] * len(owners), strict=True):
        if (reached or parameter.requires_grad) and not state.get(parameter):
            state[parameter] = new_state(parameter, terms, own=own, amsgrad=group["amsgrad"])


def restore(state: dict[Tensor, State], groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Copy a checkpoint's tensors, in the dtypes they are kept in.

    ``Optimizer.load_state_dict`` would cast norms to the parameter's dtype, and share memory with the checkpoint.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for key, saved in state_dict["state"].get(index, {}).items():
            if key in BALANCE_KEYS:
                state[parameter][key] = saved.to(parameter.device, balance_dtype([parameter]), copy=True)
            else:
                placed = sharding.place(saved.to(parameter.device), parameter)
                state[parameter][key] = placed.to(parameter.dtype, copy=True)


def read_rows(states: Sequence[State], key: str, like: Tensor) -> Tensor:
    """Stack one small entry of all parameters: P tensors [k] -> [P, k], in the dtype and on the device of ``like``."""
    return torch.stack([state[key].to(like) for state in states])


def write_rows(states: Sequence[State], key: str, rows: Tensor) -> None:
    """Write back what ``read_rows`` gave, in place."""
    torch._foreach_copy_([state[key] for state in states], list(rows.unbind()))
