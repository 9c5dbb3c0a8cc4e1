"""Balances the gradients at a network's output, as EnCodec does."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mtadam.balancers import norm_averages
from lightning_mtadam.balancers.batch import Batch, wide
from lightning_mtadam.balancers.importance import WeighsTerms
from lightning_mtadam.balancers.marked_outputs import (
    find_outputs,
    gradients_at,
    mark_outputs,
    refuse_nested,
    sample_norms,
)
from lightning_mtadam.constants import constant
from lightning_mtadam.terms import plain


class OutputBalancer(WeighsTerms):
    r"""EnCodec's balancer (Defossez et al. 2022): every term has a fixed share of the gradient at a network's output.

    With ``x`` the output, of the samples ``x_k``, for the terms that are present::

        g_i  = grad_x L_i
        n_i <- ema_decay n_i + (1 - ema_decay) sum_k ||g_i[k]||        corrected for its start at zero
        g    = sum_i (weight_i / sum_j weight_j) g_i / n_i

    ``g`` then goes through the network in one backward pass. Each term is differentiated by itself only down to the
    output. A constant factor on a loss changes nothing.

    The module's output must be one tensor, its first dimension the samples. It may be called several times in a step,
    on other inputs: the norms of all calls are added up. All that is trained must lie before the output.

    Under accumulation every batch is balanced by itself, by the average that takes in what the step has seen so far;
    the average moves once a step, as if the batches were one.

    Args:
        output: the name of the module whose output is balanced, as in ``model.named_modules()``.
        weights: the wanted shares, by term; equal ones by default. Only their ratios count. What ``set_importance``
            gives multiplies them.
        ema_decay: of the averages of the norms.
        terms: the names of the losses, if known ahead; those of ``weights`` by default.

    Raises:
        ValueError: an option is out of range; a name that the network has not; a term that does not pass through the
            output, or that reaches a trained parameter on another way as well, so that this part of its gradient would
            be lost; an output that goes into another one; a wrapper with ``static_graph``; parameters are sharded.
        TypeError: the module's output is no tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> balancer = OutputBalancer(output="2", weights={"fit": 3.0, "size": 1.0})
        >>> balancer.attach(model)  # a MultiTermLightningModule does that by itself
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> output = model(torch.ones(8, 4))
        >>> losses = {"fit": (output - 9).abs().mean(), "size": 1e3 * output.abs().mean()}
        >>> balancer.backward(losses, optimizer, model=model)
        >>> optimizer.step()
        >>> weights = balancer.term_weights()
        >>> round(float(weights["fit"] / weights["size"]))
        3000

    References:
        Defossez, Copet, Synnaeve, Adi: High Fidelity Neural Audio Compression, 2022, section 3.4, and ``balancer.py``
        of the authors' audiocraft. There the norms of the samples are averaged; here they are added up, so that ``g``
        is smaller by the number of samples: then the step of a loss that is a mean over the batch depends neither on
        the batch's size nor on the number of processes. Adam does not see that factor.
    """

    looks_ahead: ClassVar[bool] = True

    def __init__(
        self,
        output: str,
        weights: Mapping[str, float] | None = None,
        ema_decay: float = 0.999,
        terms: Iterable[str] | None = None,
    ) -> None:
        super().__init__(weights if terms is None else terms)
        ema_decay, weights = plain((ema_decay, weights))
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, but got {ema_decay!r}.")
        for name, weight in (weights or {}).items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"weights[{name!r}] must be finite and above 0, but is {weight!r}.")
        if weights is not None and set(weights) != set(self._terms):
            raise ValueError(f"weights has the terms {tuple(weights)}, but terms are {self._terms}. Give one for each.")
        self.output, self.ema_decay = output, ema_decay
        self.weights = None if weights is None else {name: float(weights[name]) for name in self._terms}
        self._attached: weakref.ref[nn.Module] | None = None
        self._outputs: list[Tensor] = []  # between the check of a batch and its backward passes
        self._nesting_checked = False
        self._observed = torch.empty(0)  # in this step so far: presence and norm, [2, I]

    def attach(self, model: nn.Module) -> None:
        """Mark the module's outputs from now on."""
        if self._attached is None or self._attached() is not model:
            mark_outputs(model, self.output)
            self._attached = weakref.ref(model)

    def term_weights(self) -> dict[str, Tensor]:
        """What multiplies each loss if all terms are present: its share over its norm; zero if it had no gradient."""
        if not self.state:
            return {}
        norms, everywhere = norm_averages.averages(self.state, self.ema_decay), self.state["counts"] >= 0
        return dict(zip(self._terms, _scales(norms, self._wanted(self._terms), everywhere).unbind(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_attached": None, "_outputs": []}

    def check(self, batch: Batch, optimizer: Optimizer) -> None:
        """As of every balancer."""
        super().check(batch, optimizer)
        self._outputs = find_outputs(batch.losses, self.output, batch.parameters)
        if not self._nesting_checked:
            refuse_nested(self._outputs, self.output)
            self._nesting_checked = True

    def balance(self, batch: Batch) -> None:
        """As of every balancer."""
        terms, outputs, self._outputs = batch.terms, self._outputs, []
        gradients = {name: gradients_at(outputs, loss, batch) for name, loss in batch.losses.items()}
        share = batch.share.to(wide(batch.share.dtype))
        seen = share.new_zeros(2, len(terms))
        for name, found in gradients.items():
            seen[:, terms.index(name)] = torch.stack([share, share * sample_norms(found).to(share)])
        seen[1] = batch.mean_of_all(seen[1])
        observed = seen if batch.begins else self._observed + seen
        after = norm_averages.advance(self.state_before, observed, self.ema_decay)
        scales = _scales(norm_averages.averages(after, self.ema_decay), self._wanted(terms), seen[0] > 0)
        by_name = dict(zip(terms, scales.unbind(), strict=True))
        batch.run(_surrogate(outputs, gradients, by_name) * batch.factor)
        self._observed, self.state = observed, after

    def _wanted(self, terms: tuple[str, ...]) -> list[float]:
        shares = [1.0 if self.weights is None else self.weights[name] for name in terms]
        return [share * importance for share, importance in zip(shares, self.importance_of(terms), strict=True)]


def _scales(norms: Tensor, wanted: Sequence[float], present: Tensor) -> Tensor:
    """``weight_i / (n_i sum of the weights present)``, zero where there is no norm, or no weight. [I] each."""
    weights = constant(wanted, norms.dtype, norms.device)
    total = torch.where(present, weights, 0).sum()
    shares = weights / torch.where(total > 0, total, 1)
    return torch.where(norms > 0, shares / norms, 0)


def _surrogate(
    outputs: Sequence[Tensor], gradients: Mapping[str, Sequence[Tensor]], scales: Mapping[str, Tensor]
) -> Tensor:
    """A scalar whose gradient at the outputs is the balanced one."""
    products = []
    for index, output in enumerate(outputs):
        balanced = torch.stack([scales[name] * found[index] for name, found in gradients.items()]).sum(0)
        products.append((output * balanced).sum())
    return torch.stack(products).sum()
