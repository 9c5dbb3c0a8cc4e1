"""Balances the gradients at a layer that the terms share, in closed form."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mtadam import balancing
from lightning_mtadam.balancers import norm_averages
from lightning_mtadam.balancers.batch import Batch, wide
from lightning_mtadam.balancers.importance import WeighsTerms
from lightning_mtadam.balancers.marked_outputs import gradients_at, mark_outputs, outputs_of, sample_norms
from lightning_mtadam.balancers.shared_layer import check_repeatable, gradient_at, parameters_of, unreached_message
from lightning_mtadam.constants import constant
from lightning_mtadam.terms import ANCHOR_POLICIES, check_anchor, plain

Place = Literal["parameters", "output"]
_HEAD = 2  # of what is observed of a term the columns before its gradient: presence, whether it reaches the layer


class SharedLayerBalancer(WeighsTerms):
    r"""Every term's gradient at one shared layer is brought to the magnitude of the anchor's, by a weight on its loss.

    With ``W`` the parameters of the layer (or its output, with ``at="output"``)::

        n_i <- decay n_i + (1 - decay) ||grad_W L_i||        corrected for its start at zero
        w_i  = importance_i min(n_anchor / n_i, limit)
        the network trains on sum_i w_i L_i

    There is one backward pass; beside it the terms are differentiated down to the layer only. The weights follow at
    once: a constant factor on a loss other than the anchor changes nothing, within the limit. They are never inf or
    nan: a term that has had no gradient at the layer yet keeps its importance as its weight, which is how a loss that
    acts elsewhere, such as a codebook's, is added. An absent term keeps its average. Where the anchor has had no
    gradient yet, the geometric mean of the others takes its place.

    Norms are those of the gradient of all batches and processes of the step so far: under accumulation every batch is
    weighed by what the step has seen by then, and the averages move once a step, as if the batches were one.

    Args:
        shared: the name of the module or parameter in the network: commonly the last layer that all terms share, such
            as the last one of a decoder.
        anchor: the term that the others are brought to: its name, "first", "mean" (geometric, over the terms that
            reach the layer) or "max"; ``None`` is the first.
        importance: wanted ratios, by term; 1 by default. ``set_importance`` changes them.
        decay: of the averages of the norms; 0 goes by the norms of this step alone.
        limit: the largest ratio of norms; what a term that is nearly satisfied is amplified by at the most.
        at: whether gradients are compared at the layer's "parameters" or at its "output", which must be one tensor
            whose first dimension counts samples; their norms are added up.
        terms: the names of the losses, if known ahead.

    Raises:
        ValueError: an option is out of range; a name that the network has not, or that holds no trained parameter; at
            its first loss, an anchor that does not reach the layer; a term that has another gradient there when it is
            differentiated again, as some fused losses have; a wrapper with ``static_graph``; parameters are sharded.
        TypeError: ``anchor`` is no string.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> balancer = SharedLayerBalancer(shared="2", importance={"gan": 0.5})
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> output = model(torch.ones(8, 4))
        >>> losses = {"l1": (output - 1).abs().mean(), "gan": 2e4 * (output - 1).abs().mean()}
        >>> balancer.backward(losses, optimizer, model=model)
        >>> {name: round(float(weight), 6) for name, weight in balancer.term_weights().items()}
        {'l1': 1.0, 'gan': 2.5e-05}

    References:
        Esser, Rombach, Ommer: Taming Transformers for High-Resolution Image Synthesis, 2021, equation 7 (VQGAN's
        adaptive weight), which has ``decay=0``, a limit of 1e4 and 1e-4 in the denominator. He et al.: MultiBalance,
        2024, takes gradients at the shared features, as ``at="output"`` does.
    """

    looks_ahead: ClassVar[bool] = True

    def __init__(
        self,
        shared: str,
        anchor: str | None = None,
        importance: Mapping[str, float] | None = None,
        decay: float = 0.9,
        limit: float = 1e6,
        at: Place = "parameters",
        terms: Iterable[str] | None = None,
    ) -> None:
        super().__init__(terms, importance)
        decay, limit = plain((decay, limit))
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, but got {decay!r}.")
        if not limit > 0:
            raise ValueError(f"limit must be above 0, but got {limit!r}.")
        if at not in get_args(Place):
            raise ValueError(f"at must be 'parameters' or 'output', but got {at!r}.")
        if anchor is not None and not isinstance(anchor, str):
            raise TypeError(f"anchor must be one of {ANCHOR_POLICIES[:3]}, a term's name or None, but got {anchor!r}.")
        if anchor == "unit":
            raise ValueError("anchor must be 'first', 'mean', 'max', a term's name or None, but got 'unit'.")
        self.shared, self.anchor, self.decay, self.limit, self.at = shared, anchor or "first", decay, limit, at
        if self._terms:
            check_anchor(self.anchor, self._terms)
        self._attached: weakref.ref[nn.Module] | None = None
        self._layer: list[Tensor] = []  # the shared parameters
        self._repeated: set[str] = set()  # the terms that were differentiated twice, to see whether they can be
        self._anchored = False  # whether the anchor was seen to reach the layer
        self._observed = torch.empty(0)  # in this step so far: [I, _HEAD + |W|]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_attached": None, "_layer": []}

    def attach(self, model: nn.Module) -> None:
        """Mark the layer's outputs from now on, if gradients are compared there."""
        if self.at == "output" and (self._attached is None or self._attached() is not model):
            mark_outputs(model, self.shared, "shared")
            self._attached = weakref.ref(model)

    def gradient_norms(self) -> dict[str, Tensor]:
        """The averages n_i at the layer, [I]; zero where a term has had no gradient there."""
        return {self.shared: norm_averages.averages(self.state, self.decay)} if self.state else {}

    def balance_weights(self) -> dict[str, Tensor]:
        """The balance weights n_i / n_anchor at the layer, [I]; nan where a term has had no gradient there."""
        found = {shared: norms[None] for shared, norms in self.gradient_norms().items()}
        return {
            shared: balancing.balance_weights(norms, self._reference(norms, self._terms))[0]
            for shared, norms in found.items()
        }

    def term_weights(self) -> dict[str, Tensor]:
        """The weights w_i, as they were in the last step of each term."""
        if not self.state:
            return {}
        return dict(zip(self._terms, self._weights(self.state, self._terms).unbind(), strict=True))

    def check(self, batch: Batch, optimizer: Optimizer) -> None:
        """As of every balancer."""
        super().check(batch, optimizer)
        check_anchor(self.anchor, self._terms or tuple(batch.losses))
        if self.at == "parameters":
            self._layer = parameters_of(batch.network, self.shared)

    def balance(self, batch: Batch) -> None:
        """As of every balancer."""
        terms, dtype = batch.terms, wide(next(iter(batch.losses.values())).dtype)
        found = {name: self._look(loss, batch, dtype) for name, loss in batch.losses.items()}
        self._check_repeatable(found, batch, dtype)
        width = 1 if self.at == "output" else sum(parameter.numel() for parameter in self._layer)
        seen = torch.zeros(len(terms), _HEAD + width, dtype=dtype, device=batch.factor.device)
        for name, gradient in found.items():
            row = seen[terms.index(name)]
            row[0] = batch.share
            if gradient is not None:
                row[1], row[_HEAD:] = 1, gradient
        observed = seen if batch.begins else self._observed + seen
        whole = batch.mean_of_all(observed)
        self._check_anchor(whole[:, 1], batch)
        norms = torch.linalg.vector_norm(whole[:, _HEAD:], dim=1)
        after = norm_averages.advance(self.state_before, torch.stack([whole[:, 0], norms]), self.decay)
        weights = self._weights(after, terms)
        # So that a gradient scaler sees it: the weights may be small enough to hide what was not finite.
        batch.run_weighted(torch.where(norms.isfinite().all(), weights, torch.nan))
        self._observed, self.state = observed, after

    def _look(self, loss: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor | None:
        """What is added up of a term over batches and processes: its gradient [|W|], or its norm at the output [1]."""
        if self.at == "parameters":
            return gradient_at(self._layer, loss, batch, dtype)
        outputs = outputs_of(loss, self.shared)
        if not outputs:
            return None
        norm = sample_norms(gradients_at(outputs, loss, batch)).to(dtype)
        return (batch.share.to(dtype) * norm)[None]

    def _check_repeatable(self, found: Mapping[str, Tensor | None], batch: Batch, dtype: torch.dtype) -> None:
        """Raise if a term that is new here has another gradient the second time."""
        for name in found.keys() - self._repeated:
            check_repeatable(name, found[name], self._look(batch.losses[name], batch, dtype), type(self).__name__)
        self._repeated |= found.keys()

    def _check_anchor(self, reached: Tensor, batch: Batch) -> None:
        """Raise, on all processes, if the anchor does not reach the layer, [I]; the host reads it once."""
        name = batch.terms[0] if self.anchor == "first" else self.anchor
        if not self._anchored and name in batch.losses:
            if not bool(reached[batch.terms.index(name)]):
                raise ValueError(unreached_message(name))
            self._anchored = True

    def _weights(self, state: norm_averages.State, terms: tuple[str, ...]) -> Tensor:
        """The weights w_i, [I]."""
        norms = norm_averages.averages(state, self.decay)[None]
        importance = constant(self.importance_of(terms), norms.dtype, norms.device)
        scales = balancing.balance_scales(norms, self._reference(norms, terms), importance, self.limit)
        return torch.where(state["counts"] > 0, scales[0], importance)

    def _reference(self, norms: Tensor, terms: tuple[str, ...]) -> Tensor:
        """n_anchor, [1, 1]."""
        return balancing.reference_norms(norms, balancing.reference_of(self.anchor, terms))
