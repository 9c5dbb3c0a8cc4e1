"""What an optimizer's checkpoint must agree on, and the errors that name what differs. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_mtadam.terms import PLACEHOLDER, clean_names

Groups: TypeAlias = Sequence[Mapping[str, Any]]

ANEW = (
    "Load only the weights, and let the optimizer begin anew: leave out optimizer.load_state_dict, or in Lightning give"
    " fit() the module of load_from_checkpoint(path), and no ckpt_path"
)


def check_form(state_dict: object) -> None:
    """Raise unless it is what an optimizer's ``state_dict()`` gives."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict takes what optimizer.state_dict() gave, but got a {type(state_dict).__name__}."
        )
    for key in ("param_groups", "state"):
        if key not in state_dict:
            raise ValueError(
                f"load_state_dict takes what optimizer.state_dict() gave, but got a dict without {key!r}, with"
                f" {[*state_dict][:4]}. In a checkpoint of Lightning's it is checkpoint['optimizer_states'][0]."
            )


def check_written_by_mtadam(saved_groups: Groups) -> None:
    """Raise ``ValueError`` if the state is another optimizer's."""
    for group in saved_groups:
        if "terms" not in group:
            raise ValueError(
                f"The checkpoint was not written by MTAdam: its parameter groups name no terms, {_writer(group)}. Its"
                f" moments are of one gradient, not of each term's. {ANEW}."
            )
    if len({tuple(group["terms"]) for group in saved_groups}) > 1:
        raise ValueError(
            f"The checkpoint's parameter groups have different terms, {[tuple(one['terms']) for one in saved_groups]}:"
            " it was changed after MTAdam wrote it. Load it as it was written."
        )


def _writer(group: Mapping[str, Any]) -> str:
    """Which optimizer a group seems to be of."""
    if "nesterov" in group:
        return "and look like those of torch.optim.SGD"
    if len(group.get("betas", ())) == 2:
        return "and have two betas, like those of torch.optim.Adam and AdamW"
    return f"but have {sorted(set(group) - {'params'})}"


def check_options_of_groups(
    saved_groups: Groups, names: Collection[str], check: Callable[[Mapping[str, Any]], None]
) -> None:
    """Raise unless each group has these options, and ``check`` lets their values pass; more are the user's own."""
    for index, group in enumerate(saved_groups):
        where = f"The checkpoint's parameter group {index}"
        for name in sorted(names):
            if name not in group:
                raise ValueError(
                    f"{where} has no {name!r}. Load it as MTAdam.state_dict() gave it, or add {name!r} to the group."
                )
        try:
            check(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where} does not fit: {error} Load it as MTAdam.state_dict() gave it.") from None


def check_keys(state: Mapping[Any, Any], saved_groups: Groups) -> None:
    """Raise ``ValueError`` if there is a state of what is no parameter of the groups."""
    indices = {index for group in saved_groups for index in group["params"]}
    for key, value in state.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"The checkpoint's state of {key!r} must be a dict, but is a {type(value).__name__}.")
        if key not in indices:
            raise ValueError(
                f"The checkpoint has a state for {key!r}, but its parameter groups hold no such parameter. Load it as"
                " MTAdam.state_dict() gave it, or remove that entry of its 'state'."
            )


def check_groups(groups: Groups, saved_groups: Groups) -> None:
    """Raise ``ValueError`` unless the parameter groups hold the same parameters."""
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
                if name != saved_name and not (name + saved_name).count(PLACEHOLDER):
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


def check_terms_with(check: Callable[[Sequence[str]], None], saved: tuple[str, ...]) -> None:
    """Raise ``ValueError`` if the optimizer's anchor or importances are none of the checkpoint's terms."""
    try:
        if saved:
            check(saved)
    except ValueError as error:
        raise ValueError(f"The checkpoint has the terms {saved}, which do not fit the optimizer: {error}") from None


def check_materialized(parameter: Tensor, name: str) -> None:
    """Raise ``ValueError`` if a parameter has no shape yet."""
    if is_lazy(parameter):
        raise ValueError(
            f"The parameter {name!r} has no shape yet: load the network's weights, or call the network once, before the"
            " optimizer's state is loaded."
        )


def check_options(saved: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the options that say what the numbers mean are the same."""
    for option, value in options.items():
        if option not in saved:
            raise ValueError(f"The checkpoint does not say with which {option} it was written. Add {option!r} to it.")
        if saved[option] != value:
            raise ValueError(
                f"The checkpoint was written with {option}={saved[option]!r}, the optimizer has {option}={value!r}."
                f" Its numbers mean something else. Use MTAdam(..., {option}={saved[option]!r}), or start anew."
            )


def check_entries(
    state: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], optional: Collection[str], name: str
) -> None:
    """Raise ``ValueError`` unless a parameter's state has tensors of these shapes; ``name``: the parameter's."""
    for key in state:
        if key not in shapes:
            raise ValueError(
                f"The checkpoint has {key!r} for the parameter {name!r}, which is no part of MTAdam's state. Load what"
                f" MTAdam.state_dict() gave, or remove that entry of its 'state'. {ANEW}."
            )
    for key, shape in shapes.items():
        value = state.get(key)
        if value is None and key in optional:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"The checkpoint has no {key!r} for the parameter {name!r}. {ANEW}.")
        if tuple(value.shape) != shape:
            raise ValueError(
                f"The checkpoint's {key!r} of the parameter {name!r} has shape {tuple(value.shape)}, but {shape} is"
                " needed: the parameter had another shape. Load it into the network it was written with."
            )
