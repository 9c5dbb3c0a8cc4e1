"""The importance of terms: the wanted ratios of their balanced gradients, checked, and as an optimizer's groups say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.groups import GroupsOptimizer
from lightning_mtadam.terms import check_names, kind_of, plain, unknown_name_message

Importance: TypeAlias = dict[str, float]
Groups: TypeAlias = Sequence[Mapping[str, Any]]


class ImportanceOptimizer(GroupsOptimizer):
    """An optimizer whose groups say the importance of its terms; what holds is taken from there at its time."""

    _options: Any  # their ``importance`` is what holds, and changes in place

    def set_importance(self, importance: Mapping[str, float]) -> None:
        """Change the importance of these terms, from the next :meth:`backward` on; the others keep theirs.

        It is ``param_groups[0]["importance"]``, and in checkpoints. 0 takes a term's influence away, also from the
        anchors "mean" and "max", while its norms go on, so that it comes back at its right scale. What was collected
        before is stepped on as it was. Where several batches accumulate, all count as of the last, with
        ``balance_every`` and in a light step each as of its own: call it before the first. All processes must make the
        same call before the same step, or the next :meth:`backward` raises. ``docs/importance.md`` says how to choose.

        Args:
            importance: by term, at least 0. Terms that are not named keep theirs.

        Raises:
            TypeError: it is no mapping of names to numbers.
            ValueError: a number is negative, inf or nan, or there is no term of that name. Nothing was changed.

        Example:
            >>> from lightning_mtadam import MTAdam
            >>> w = torch.ones(2, requires_grad=True)
            >>> optimizer = MTAdam([w], terms=("fit", "kl"))
            >>> optimizer.set_importance({"kl": 0.1})
            >>> optimizer.backward({"fit": w.square().sum(), "kl": 100 * w.sum()})
            >>> optimizer.step()
            >>> [round(float(scale), 4) for scale in optimizer.scales()["parameter_0"]]
            [1.0, 0.002]
        """
        new = check_importance(importance, self.defaults["terms"])
        self._want({**check_importance(self.param_groups[0]["importance"]), **new})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it has the importance that the others have."""
        for group in self.param_groups[:1]:
            self.defaults["importance"] = group["importance"]
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        wanted = self.defaults["importance"]
        if not isinstance(group["importance"], Mapping) or _said(group["importance"]) != _said(wanted):
            raise ValueError(
                f"importance holds for the whole optimizer, where it is {wanted!r}: give it to MTAdam, or call"
                " optimizer.set_importance({...}); leave it out of the parameter group, which has"
                f" {group['importance']!r}."
            )
        super()._check_group({key: value for key, value in group.items() if key != "importance"})

    def _want(self, importance: Importance) -> None:
        """Let all groups, and those to come, have this importance."""
        for group in (self.defaults, *self.param_groups):
            group["importance"] = importance

    def _name_importance(self, terms: Sequence[str]) -> None:
        """Let all terms be named: torch.distributed.checkpoint loads only the names that are there."""
        self._want({**dict.fromkeys(terms, 1.0), **_said(self.defaults["importance"])})

    def _take_importance(self, terms: Sequence[str]) -> None:
        """Let what the groups say hold from now on, or raise if it is not what these terms can have."""
        held: Importance = self._options.importance
        self._want(importance_of(self.param_groups, terms))
        held.clear()
        held.update(self.defaults["importance"])


def check_importance(importance: object, terms: Sequence[str] = ()) -> Importance:
    """The same with Python's numbers, or raise. ``terms``: those that are known; none allow any name.

    Raises:
        TypeError: it is no mapping of names to numbers.
        ValueError: a number is negative, inf or nan, or a name is no term's.

    Example:
        >>> check_importance({"kl": torch.tensor(0.5)}, terms=("fit", "kl"))
        {'kl': 0.5}
    """
    if not isinstance(importance, Mapping):
        raise TypeError(
            f"importance must be a mapping of terms' names to numbers, but is {kind_of(importance)}. Write"
            " {'kl': 0.1}; terms that are left out keep theirs, 1 at first."
        )
    found: Importance = plain(importance)
    check_names(found)
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
            raise ValueError(f"importance[{name!r}] must be a finite number of at least 0, but got {value!r}.")
        if terms and name not in terms:
            raise ValueError(unknown_name_message("importance", name, terms))
    return found


def importance_of(groups: Groups, terms: Sequence[str] = ()) -> Importance:
    """What all groups say, or raise: it holds for the whole optimizer."""
    found = [check_importance(group.get("importance"), terms) for group in groups]
    for index, other in enumerate(found):
        if _said(other) != _said(found[0]):
            raise ValueError(
                f"param_groups[{index}]['importance'] is {other!r}, but that of param_groups[0] is {found[0]!r}:"
                " importance holds for the whole optimizer. Call optimizer.set_importance({...}), which sets all."
            )
    return found[0]


def _said(importance: Mapping[str, float]) -> Importance:
    """What differs from the usual, 1."""
    return {name: value for name, value in importance.items() if value != 1}


def importance_of_checkpoint(saved_groups: Groups, groups: Groups) -> Importance:
    """What a checkpoint says, or raise; the optimizer's own where it is from before it was kept there."""
    terms = saved_groups[0]["terms"] or groups[0]["terms"]
    if not any("importance" in group for group in saved_groups):
        return importance_of(groups, terms)
    try:
        return importance_of(saved_groups, terms)
    except (TypeError, ValueError) as error:
        raise type(error)(f"The checkpoint does not fit: {error} Load it as MTAdam.state_dict() gave it.") from None


def table(importance: Importance, terms: Sequence[str], like: Tensor) -> Tensor:
    """The importance of each term, 1 where it is not named: [I], of the dtype and device of ``like``.

    It is filled in on the device: for a copy from there the host would wait, at every change.
    """
    largest = torch.finfo(like.dtype).max
    with torch.inference_mode(False):  # what an evaluation makes is used by the next step
        made = torch.ones(len(terms), dtype=like.dtype, device=like.device)
        for index, term in enumerate(terms):
            if importance.get(term, 1) != 1:
                made[index].fill_(min(float(importance[term]), largest))
    return made
