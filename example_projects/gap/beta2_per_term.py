"""MTAdam with a beta2 for each term, to see whether that helps. Not for use: it does what the experiment needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from example_projects.gap.memory import Memory
from lightning_mtadam.balancing import balance_scales, target_norms, update_norms
from lightning_mtadam.optim.options import Options
from lightning_mtadam.terms import Losses


class Beta2PerTerm(Optimizer):
    r"""MTAdam, but for beta2: a rule chooses one for each layer and term in every step.

    For a layer and a term :math:`i`::

        v_i   <- beta2_i v_i + (1 - beta2_i) g~_i^2
        w_i   <- beta2_i w_i + (1 - beta2_i)
        theta <- theta - lr M^ / (sqrt(max_i v_i / w_i) + eps)

    where w_i corrects the bias, as one minus beta2's power does if beta2 is constant. The rest is as in
    :class:`~lightning_mtadam.MTAdam`. Every step needs all terms. Parameters are one flat vector of ``N`` elements.

    Args:
        params: what to train, one group.
        lr: learning rate.
        memory: the rule.
        terms: the names of the losses.
        betas: decay of the first moment, and of the gradient norms.
        eps: added to the denominator.
        anchor: as of MTAdam.
        importance: as of MTAdam.
        layers: the unit that is balanced, "parameter" or "global".
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float,
        memory: Memory,
        *,
        terms: Sequence[str],
        betas: tuple[float, float] = (0.9, 0.9),
        eps: float = 1e-8,
        anchor: str | None = "first",
        importance: Mapping[str, float] | None = None,
        layers: Literal["parameter", "global"] = "parameter",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self.memory, self.terms = memory, tuple(terms)
        self.options = Options(anchor=anchor, importance=dict(importance or {}), layers=layers)
        self.options.check_terms(self.terms)
        self.parameters: list[Parameter] = self.param_groups[0]["params"]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.layer_sizes = [sum(self.sizes)] if layers == "global" else self.sizes
        self.gradients = torch.empty(0)
        self.state[self.parameters[0]] = self._start()

    def backward(self, losses: Losses) -> None:
        """Differentiate every term by itself; :meth:`step` needs the gradients."""
        rows = []
        for term in self.terms:
            graph = {"retain_graph": term != self.terms[-1], "allow_unused": True, "materialize_grads": True}
            found = torch.autograd.grad(losses[term], self.parameters, **graph)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
        self.gradients = torch.stack(rows)  # [I, N]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Balance the gradients, update the moments, and step."""
        group, state = self.param_groups[0], self.state[self.parameters[0]]
        beta1, beta3 = group["betas"]
        norms = self._average_norms(state, beta3)
        importance = norms.new_tensor([self.options.importance.get(term, 1.0) for term in self.terms])
        target = target_norms(norms, self.options.anchor, self.terms)
        scales = balance_scales(norms, target, importance, math.inf)
        balanced = self._spread(scales) * self.gradients
        # M <- beta1 M + (1 - beta1) sum_i g~_i
        state["first"].mul_(beta1).add_(balanced.sum(0), alpha=1 - beta1)
        state["clock"] += 1
        denominator = self._second_moments(state, balanced, norms).amax(0).sqrt() + group["eps"]
        step = group["lr"] * state["first"] / (1 - beta1 ** state["clock"]) / denominator
        for parameter, part in zip(self.parameters, step.split(self.sizes), strict=True):
            parameter.sub_(part.view_as(parameter))

    def _start(self) -> dict[str, Any]:
        """What is remembered, at its beginning."""
        flat = self.parameters[0].detach().new_zeros
        layers, terms, elements = len(self.layer_sizes), len(self.terms), sum(self.sizes)
        per_layer = {name: flat(layers, terms) for name in ("norms", "counts", "largest", "weights")}
        return {**per_layer, "first": flat(elements), "second": flat(terms, elements), "clock": 0}

    def _average_norms(self, state: dict[str, Any], beta3: float) -> Tensor:
        """The gradient norms n_i, [L, I], and what is the largest so far."""
        parts = self.gradients.split(self.layer_sizes, dim=1)
        observed = torch.stack([part.norm(dim=1) for part in parts])
        everywhere, decay = torch.ones_like(observed, dtype=torch.bool), observed.new_tensor(beta3)
        state["norms"], state["counts"] = update_norms(
            state["norms"], state["counts"], observed, everywhere, decay, "first"
        )
        state["largest"] = torch.maximum(state["largest"], state["norms"])
        return state["norms"]

    def _second_moments(self, state: dict[str, Any], balanced: Tensor, norms: Tensor) -> Tensor:
        """The terms' second moments without their bias, [I, N]; zero where a term has not reached the layer."""
        beta2 = self.memory(norms, state["largest"])
        # v_i <- beta2_i v_i + (1 - beta2_i) g~_i^2
        state["second"].mul_(self._spread(beta2)).addcmul_(balanced * self._spread(1 - beta2), balanced)
        # w_i <- beta2_i w_i + (1 - beta2_i), from the first step on in which the term reaches the layer
        state["weights"] = torch.where(norms > 0, beta2 * state["weights"] + 1 - beta2, 0)
        return state["second"] / self._spread(torch.where(norms > 0, state["weights"], 1))

    def _spread(self, values: Tensor) -> Tensor:
        """[L, I] to [I, N]: for every element that of its layer."""
        repeats = torch.tensor(self.layer_sizes, device=values.device)
        return values.T.repeat_interleave(repeats, dim=1)
