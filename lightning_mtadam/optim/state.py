"""The optimizer's state per parameter: what it holds, how it is made, checked against a checkpoint, and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_mtadam import checkpoint
from lightning_mtadam.balancing import wide_dtype
from lightning_mtadam.distributed import sharding
from lightning_mtadam.layout import Place, pack_up, places_of
from lightning_mtadam.optim.options import Options

State: TypeAlias = dict[str, Any]
Groups: TypeAlias = Sequence[Mapping[str, Any]]

AVERAGE_KEYS = ("log_scale", "log_scale_count")  # of the scales' average; checkpoints from before it lack them
MOMENT_KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
BALANCE_KEYS = ("step", "gradient_norm", "gradient_norm_count", *AVERAGE_KEYS)  # small, in fp32 or better
SHARES = "gradient_share"  # so, too; only where layers have several parameters


def expected_shapes(parameter: Tensor, options: Options, terms: int, *, amsgrad: bool) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a parameter's state, for I terms.

    ``step`` [1 + I]: the parameter's clock, then each term's; ``exp_avg``: the merged first moment over the number of
    second moments, or one per term with denominator "own"; ``exp_avg_sq`` [I, *shape], or [1, *shape] with denominator
    "sum": the second moments, their bias already corrected; ``max_exp_avg_sq`` with amsgrad, not corrected;
    ``gradient_norm`` and ``gradient_norm_count`` [I]: the moving averages of the layer's norms; ``log_scale`` and
    ``log_scale_count`` [I]: the mean logarithm of the layer's scales, and over how many steps; ``gradient_share`` [I]:
    the parameter's share in the square of the layer's norm, where a layer has several.
    """
    shape = tuple(parameter.shape)
    first, second = options.moments(terms)
    return {
        "step": (1 + terms,),
        "exp_avg": (first, *shape) if options.denominator == "own" else shape,
        "exp_avg_sq": (second, *shape),
        **dict.fromkeys(BALANCE_KEYS[1:], (terms,)),
        **({SHARES: (terms,)} if options.shares_layers else {}),
        **({"max_exp_avg_sq": (second, *shape)} if amsgrad else {}),
    }


@torch.inference_mode(False)  # what an evaluation makes must be changed by the next step
def allocate(state: dict[Tensor, State], groups: Groups, held: Sequence[bool], options: Options, terms: int) -> None:
    """Make the state of parameters that are trained, or have a gradient ``held``: zeros, sharded as they are."""
    owners = [(parameter, group) for group in groups for parameter in group["params"]]
    parameters = [parameter for parameter, _ in owners]
    keys = [None if hasattr(parameter, "to_local") else id(group) for parameter, group in owners]
    flags = [*held, *[False] * (len(owners) - len(held))]
    new = [
        not state.get(one) and (flag or one.requires_grad) and not is_lazy(one)
        for one, flag in zip(parameters, flags, strict=True)
    ]
    for pack in pack_up(parameters, new, keys):
        mine, group = [parameters[member] for member in pack], owners[pack[0]][1]
        for parameter in mine:
            state[parameter] = _zeros(parameter, expected_shapes(parameter, options, terms, amsgrad=group["amsgrad"]))
        moments, places = [state[parameter] for parameter in mine], places_of(mine, keys[pack[0]])
        for key, leading in leading_of(options, terms).items():
            if keys[pack[0]] is not None and key in moments[0]:
                join_moments(moments, key, leading, places)


def leading_of(options: Options, terms: int) -> dict[str, int]:
    """How many there are of each kind of moments, by their name in the state."""
    first, second = options.moments(terms)
    return dict(zip(MOMENT_KEYS, (first, second, second), strict=True))


def _zeros(parameter: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> State:
    """A new state. Its moments take no memory before they are joined with those of others, unless they are sharded."""
    wide, device, sharded = wide_dtype([parameter]), parameter.device, hasattr(parameter, "to_local")
    return {
        key: torch.zeros(shape, dtype=wide, device=device)
        if key in (*BALANCE_KEYS, SHARES)
        else sharding.zeros(shape, parameter.dtype, parameter)
        if sharded
        else torch.zeros((), dtype=parameter.dtype, device=device).expand(shape)
        for key, shape in shapes.items()
    }


@torch.inference_mode(False)
def restore(state: dict[Tensor, State], groups: Groups, state_dict: Mapping[str, Any], options: Options) -> None:
    """Copy a checkpoint's tensors, in the dtypes they are kept in: torch would cast norms, and share memory with it.

    One from before norms were told apart by parameter begins them anew.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        loaded = state_dict["state"].get(index, {})
        for key, saved in loaded.items():
            if key in (*BALANCE_KEYS, SHARES):
                state[parameter][key] = saved.to(parameter.device, wide_dtype([parameter]), copy=True)
            else:
                placed = sharding.place(saved.to(parameter.device), parameter)
                state[parameter][key] = placed.to(parameter.dtype, copy=True)
        for key in AVERAGE_KEYS if loaded else ():
            state[parameter].setdefault(key, torch.zeros_like(state[parameter]["gradient_norm"]))
        if loaded and options.shares_layers and SHARES not in loaded:
            anew = ("gradient_norm", "gradient_norm_count", SHARES)
            state[parameter].update({key: torch.zeros_like(state[parameter]["log_scale"]) for key in anew})


def join_moments(states: Sequence[State], key: str, leading: int, places: Sequence[Place]) -> Tensor:
    """One flat tensor [R, elements] of a moment of parameters that lie side by side; their states get views into it.

    ``leading``: R, the moments there are of each element; ``places``: of the parameters.
    """
    moments, size = [state[key] for state in states], leading * sum(place.room for place in places)
    if hasattr(moments[0], "to_local"):  # a DTensor keeps the memory it has, and shares it with no other
        states[0][key] = moments[0].contiguous()
        return sharding.local(states[0][key]).view(leading, -1)
    filled = next((moment for moment in moments if moment.numel()), moments[0])  # the memory of the others is any
    if filled.untyped_storage().nbytes() == size * filled.element_size():
        whole: Tensor = filled.as_strided((leading, size // leading), (size // leading, 1), 0)
        if all(map(_are_same, moments, _views(whole, places, moments))):  # they are joined already
            return whole
    whole = moments[0].new_zeros(leading, size // leading)
    for state, view in zip(states, _views(whole, places, moments), strict=True):
        view.copy_(state[key])
        state[key] = view
    return whole


def _views(whole: Tensor, places: Sequence[Place], moments: Sequence[Tensor]) -> list[Tensor]:
    """Where the moments lie in flat memory, in their shapes."""
    starts = accumulate((place.room for place in places), initial=0)
    views = [place.view(whole, start) for place, start in zip(places, starts, strict=False)]
    return [view.view(moment.shape) for view, moment in zip(views, moments, strict=True)]


def _are_same(tensor: Tensor, view: Tensor) -> bool:
    """Whether they are the same elements of the same memory."""
    if not tensor.numel():
        return True
    same_memory = tensor.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
    return same_memory and (tensor.storage_offset(), tensor.stride()) == (view.storage_offset(), view.stride())


def check_checkpoint(
    state_dict: Mapping[str, Any], groups: Groups, names: Sequence[str], options: Options, terms: tuple[str, ...]
) -> None:
    """Raise unless ``state_dict`` fits the optimizer: its form, groups, names, options, terms and state."""
    checkpoint.check_form(state_dict)
    saved_groups, found = state_dict["param_groups"], state_dict["state"]
    checkpoint.check_written_by_mtadam(saved_groups)
    checkpoint.check_groups(groups, saved_groups)
    saved_terms = tuple(saved_groups[0]["terms"])
    checkpoint.check_same_terms(saved_terms, terms)
    checkpoint.check_terms_with(options.check_terms, saved_terms)
    checkpoint.check_options(saved_groups[0], options.state_meaning)
    checkpoint.check_keys(found, saved_groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    owners = [(found.get(index), group) for group in saved_groups for index in group["params"]]
    for (state, group), name, parameter in zip(owners, names, parameters, strict=True):
        if state:
            checkpoint.check_materialized(parameter, name)
            amsgrad = group.get("amsgrad") or "max_exp_avg_sq" in state
            shapes = expected_shapes(parameter, options, len(saved_terms), amsgrad=amsgrad)
            checkpoint.check_entries(state, shapes, (*AVERAGE_KEYS, SHARES), name)
