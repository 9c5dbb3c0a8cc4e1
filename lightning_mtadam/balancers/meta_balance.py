"""MetaBalance: per layer, every term's gradient is brought part of the way to the magnitude of the anchor's."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mtadam import balancing
from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.balancers.gradient_balancer import GradientBalancer, StepGradients
from lightning_mtadam.balancers.importance import WeighsTerms
from lightning_mtadam.constants import constant
from lightning_mtadam.terms import ANCHOR_POLICIES, check_anchor, plain


class MetaBalance(WeighsTerms, GradientBalancer):
    r"""MetaBalance (He et al. 2022): MTAdam's balance per layer, relaxed, for any optimizer.

    In every layer, which is a parameter tensor, with ``g_i`` the gradient of term i::

        n_i    <- beta n_i + (1 - beta) ||g_i||               the first norm itself, when the term first reaches it
        g_i    <- (relax n_anchor / n_i + 1 - relax) g_i
        p.grad =  sum_i g_i

    With ``relax=1`` the magnitudes are those of the anchor, with ``relax=0`` the terms are added as they are. A term
    has no part in layers that it does not reach, and its norms stand still in steps in which it is absent. Rounding
    noise, which MTAdam leaves out of anchor and balance, is here added times ``1 - relax``. What ``set_importance``
    gives multiplies a term's balanced gradient, and leaves its norms as they are.

    Args:
        relax: r, how far to go, from 0 to 1.
        beta: the decay of the moving averages, at least 0 and below 1.
        anchor: the term that the others are brought to: "first", a term's name, "mean" (geometric, over the terms that
            reach the layer) or "max".
        terms: the names of the losses, if known ahead.

    Raises:
        ValueError: an option is out of range.
        TypeError: ``anchor`` is no string.

    Example:
        >>> from torch import nn
        >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> model = nn.ParameterList([w])
        >>> balancer = MetaBalance(relax=0.5)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> balancer.backward({"fit": w[0], "decay": 5 * w.square().sum()}, optimizer, model=model)
        >>> w.grad  # fit: [1, 0]; decay: [30, 40], of which 0.5 / 50 + 0.5 is taken
        tensor([16.3000, 20.4000])
        >>> balancer.balance_weights()
        {'0': tensor([ 1., 50.])}

    References:
        He, Feng, Cheng, Ji, Guo, Caverlee: MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient
        Magnitudes of Auxiliary Tasks, WWW 2022, Algorithm 1. There the averages start at zero, which after few steps
        cancels in ``n_anchor / n_i`` for terms that came together; here a term that comes later is not amplified, as it
        starts at its first norm. There a target task is given; a layer that it does not reach, where the formula would
        take the other terms' gradients away, is here balanced to the geometric mean of the terms that reach it.
    """

    def __init__(
        self, relax: float = 0.7, beta: float = 0.9, anchor: str = "first", terms: Iterable[str] | None = None
    ) -> None:
        super().__init__(terms)
        relax, beta = plain((relax, beta))
        if not 0 <= relax <= 1:
            raise ValueError(f"relax must be from 0 to 1, but got {relax!r}.")
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be at least 0 and below 1, but got {beta!r}.")
        if anchor in (None, "unit"):
            raise ValueError(f"anchor must be 'first', 'mean', 'max' or a term's name, but got {anchor!r}.")
        if not isinstance(anchor, str):
            policies = ANCHOR_POLICIES
            raise TypeError(f"anchor must be one of {policies}, a term's name or None, but got {anchor!r}.")
        self.relax, self.beta, self.anchor = relax, beta, anchor
        self._names: tuple[str, ...] = ()  # of this step's terms, which are not known to others before it is made
        if self._terms:
            check_anchor(anchor, self._terms)

    def balance_weights(self) -> dict[str, Tensor]:
        """The balance weights n_i / n_anchor by layer, tensors [I], nan where a term never reached it, or is noise."""
        if not self.state:
            return {}
        norms = _heard(torch.stack([norms for norms, _ in self.state.values()]))
        return dict(zip(self.state, balancing.balance_weights(norms, self._reference(norms)).unbind(), strict=True))

    def check(self, batch: Batch, optimizer: Optimizer) -> None:
        """As of every balancer."""
        super().check(batch, optimizer)
        check_anchor(self.anchor, self._terms or tuple(batch.losses))

    def balance(self, batch: Batch) -> None:
        """As of every balancer."""
        self._names = batch.terms
        super().balance(batch)

    def combine(self, step: StepGradients) -> list[Tensor | None]:
        """As of every balancer."""
        none = torch.zeros_like(step.norms[:1].expand(2, -1))
        before = torch.stack([self.state_before.get(layer, none).to(none) for layer in step.layers])  # [P, 2, I]
        norms, counts = balancing.update_norms(
            before[:, 0],
            before[:, 1],
            step.norms,
            step.flags(step.reached)[:, None] & step.flags(step.present),
            torch.tensor(self.beta, dtype=torch.float64, device="cpu"),
            "first",
        )
        after = torch.where(step.finite, torch.stack([norms, counts], 1), before)
        rows = zip(step.layers, step.reached, after.unbind(), strict=True)
        self.state = {**self.state_before, **{layer: row for layer, reached, row in rows if reached}}
        heard = _heard(norms)
        scales = balancing.balance_scales(heard, self._reference(heard), torch.ones_like(heard[0]), math.inf)
        importance = self.importance_of(self._terms or self._names)
        factors = constant(importance, scales.dtype, scales.device)
        return step.weighted_sum((self.relax * scales + (1 - self.relax)) * factors)

    def _reference(self, norms: Tensor) -> Tensor:
        """n_anchor, [L, 1]."""
        return balancing.reference_norms(norms, balancing.reference_of(self.anchor, self._terms or self._names))


def _heard(norms: Tensor) -> Tensor:
    """The norms, zero where they are noise: [L, I]."""
    none = torch.zeros_like(norms[0], dtype=torch.bool)
    return norms.masked_fill(balancing.loudness(norms, none)[0], 0)
