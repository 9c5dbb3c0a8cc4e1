"""The optimizer's state per parameter: what it holds, and rows of it read and written for all parameters at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim.options import Options

State: TypeAlias = dict[str, Any]

AVERAGE_KEYS = ("log_scale", "log_scale_count")
"""The entries of the scales' average over the run; checkpoints from before it was kept lack them."""

BALANCE_KEYS = ("step", "gradient_norm", "gradient_norm_count", *AVERAGE_KEYS)
"""Small entries that are kept in fp32 or better. They are equal for all parameters of a layer, but for "step"."""


def balance_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """The dtype of norms, scales and clocks: fp32, or wider if a parameter is."""
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


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
    wide = balance_dtype([parameter])
    return {
        key: torch.zeros(shape, dtype=wide, device=parameter.device)
        if key in BALANCE_KEYS
        else sharding.zeros(shape, parameter.dtype, parameter)
        for key, shape in expected_shapes(parameter, options, terms, amsgrad=amsgrad).items()
    }


def allocate(
    state: dict[Tensor, State],
    groups: Sequence[Mapping[str, Any]],
    needed: Sequence[bool],
    options: Options,
    terms: int,
) -> None:
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


def restore(state: dict[Tensor, State], groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Copy a checkpoint's tensors, in the dtypes they are kept in.

    ``Optimizer.load_state_dict`` would cast norms to the parameter's dtype, and share memory with the checkpoint.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        loaded = state_dict["state"].get(index, {})
        for key, saved in loaded.items():
            if key in BALANCE_KEYS:
                state[parameter][key] = saved.to(parameter.device, balance_dtype([parameter]), copy=True)
            else:
                placed = sharding.place(saved.to(parameter.device), parameter)
                state[parameter][key] = placed.to(parameter.dtype, copy=True)
        if loaded:
            for key in AVERAGE_KEYS:
                state[parameter].setdefault(key, torch.zeros_like(state[parameter]["gradient_norm"]))


class BalanceTable:
    """The small entries of all states as one tensor each, of which the states hold the rows.

    Args:
        states: P of them.
        dtype: of the tensors; fp32 or better.
        device: where they are kept.

    Attributes:
        clocks: [P, 1 + I], the entries "step".
        norms: [P, I], the entries "gradient_norm".
        counts: [P, I], the entries "gradient_norm_count".
        log_scales: [P, I], the entries "log_scale".
        log_scale_counts: [P, I], the entries "log_scale_count".
    """

    def __init__(self, states: Sequence[State], dtype: torch.dtype, device: torch.device) -> None:
        joined = [self._join(states, key, dtype, device) for key in BALANCE_KEYS]
        self.clocks, self.norms, self.counts, self.log_scales, self.log_scale_counts = joined
        self._rows = [[state[key] for key in BALANCE_KEYS] for state in states]

    def belongs_to(self, states: Sequence[State]) -> bool:
        """Whether these states still hold its rows."""
        return len(states) == len(self._rows) and all(
            map(is_, (state.get("step") for state in states), (rows[0] for rows in self._rows))
        )

    @staticmethod
    def _join(states: Sequence[State], key: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        joined = torch.stack([state[key].to(device, dtype) for state in states])
        for state, row in zip(states, joined.unbind(), strict=True):
            state[key] = row
        return joined


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
    joined = torch.cat([state[key].reshape(leading, size) for state, size in zip(states, sizes, strict=True)], 1)
    for state, piece in zip(states, torch.split(joined, list(sizes), 1), strict=True):
        state[key] = piece.view(state[key].shape)
    return joined
