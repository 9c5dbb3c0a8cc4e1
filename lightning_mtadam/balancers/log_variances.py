"""The parameter that uncertainty weighting learns, which is there before it is known how many terms there are."""

from __future__ import annotations

from copy import deepcopy
from typing import Any
from weakref import WeakSet

import torch
from torch import nn


class LogVariances(nn.Module):
    """What uncertainty weighting learns.

    Attributes:
        log_variances: ``s_i = log sigma_i^2``, [I]; [0] until the terms are known. Autograd does not see them: their
            gradient is known in closed form. So ``DistributedDataParallel``, which looks for parameters in the graph of
            the losses, leaves them alone.
    """

    def __init__(self, terms: int = 0, *, grew_along: bool = False) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(terms), requires_grad=False)
        self._copies = _Copies()
        self._grew_along = grew_along  # with what it is a copy of; its own losses may be others

    @property
    def size(self) -> int:
        """The number of terms; 0 while it is open."""
        return 0 if self._grew_along else self.log_variances.numel()

    def grow(self, terms: int, *, along: bool = False) -> None:
        """Hold a zero for each of the terms, unless they are held already; in place, as optimizers have the parameter.

        Copies grow along: what averages the weights copies the whole module before the first batch.

        Args:
            terms: how many.
            along: whether it is a copy, and its original's terms.
        """
        if self.size == 0 and self.log_variances.numel() != terms:
            self.log_variances.data = self.log_variances.new_zeros(terms)
        self._grew_along = along
        for copied in self._copies:
            if copied.size == 0:
                copied.grow(terms, along=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> LogVariances:
        copied = LogVariances(grew_along=self._grew_along)
        copied.log_variances = deepcopy(self.log_variances, memo)
        self._copies.add(copied)
        return copied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the number of terms from the checkpoint; if it is from before they were known, begin at zero again."""
        saved = state_dict.get(f"{prefix}log_variances")
        if saved is not None:
            self.grow(saved.numel())
            wide = torch.promote_types(saved.dtype, self.log_variances.dtype)
            self.log_variances.data = self.log_variances.data.to(wide)  # the network may be made float64 after this
            state_dict[f"{prefix}log_variances"] = saved if saved.numel() else torch.zeros_like(self.log_variances)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Copies(WeakSet[LogVariances]):
    """Those that are alive; a pickle holds none of them."""

    def __reduce__(self) -> tuple[type[_Copies], tuple[()]]:
        return _Copies, ()
