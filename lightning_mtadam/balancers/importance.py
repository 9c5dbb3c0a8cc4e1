"""The importance of terms, which may change while a balancer trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_mtadam.balancers.balancer import Balancer
from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.importance import check_importance


class WeighsTerms(Balancer):
    """A balancer whose terms have an importance each: 1, unless it is given, or set while it trains.

    Args:
        terms: the names of the losses, if known ahead.
        importance: by term, those that are not 1.

    Raises:
        TypeError: an importance that is no number, or names that are no strings.
        ValueError: one below 0, or not finite. At the first losses: one of a term that there is not.
    """

    def __init__(self, terms: Iterable[str] | None = None, importance: Mapping[str, float] | None = None) -> None:
        super().__init__(terms)
        self.importance = check_importance({} if importance is None else importance, self._terms)
        self._changed: dict[str, float] = {}  # by set_importance; they are in the checkpoint

    def set_importance(self, importance: Mapping[str, float]) -> None:
        """Change the importance of the named terms, from the next backward pass on; the others keep theirs.

        Zero takes a term's influence away, while what is remembered of it goes on. It is in the checkpoint.

        Args:
            importance: by term, at least 0.

        Raises:
            TypeError: it is no mapping of names to numbers; nothing was changed.
            ValueError: an unknown name, an importance below 0 or not finite; nothing was changed.

        Example:
            >>> import torch
            >>> from lightning_mtadam.balancers import FixedWeights
            >>> balancer = FixedWeights({"fit": 1.0, "kl": 4.0})
            >>> balancer.set_importance({"kl": 0.25})
            >>> balancer.term_weights()
            {'fit': tensor(1.), 'kl': tensor(1.)}
        """
        self._changed = {**self._changed, **check_importance(importance, self._terms)}

    def importance_of(self, terms: Iterable[str]) -> list[float]:
        """The importance of each of the ``terms``, as it is now."""
        now = {**self.importance, **self._changed}
        return [now.get(name, 1.0) for name in terms]

    def check(self, batch: Batch, optimizer: Optimizer) -> None:
        """As of every balancer."""
        super().check(batch, optimizer)
        check_importance({**self.importance, **self._changed}, self._terms or tuple(batch.losses))

    def state_dict(self) -> dict[str, Any]:
        """As of every balancer; with the importances that were set."""
        return {**super().state_dict(), "importance": dict(self._changed)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As of every balancer; with the importances that were set. Those of the other terms are as they were given."""
        terms = tuple(state_dict.get("terms", ())) or self._terms
        changed = check_importance(state_dict.get("importance", {}), terms)
        super().load_state_dict(state_dict)
        self._changed = changed
