"""The gradients of the terms in one step of an optimizer, whoever has taken them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mtadam.balancer_slot import mtadam_of
from lightning_mtadam.balancers.balancer import Balancer, parameters_in
from lightning_mtadam.balancers.gradient_balancer import GradientBalancer
from lightning_mtadam.distributed import sharding
from lightning_mtadam.extra_pass import ExtraPass, divided
from lightning_mtadam.gradient_statistics import GradientStatistics, gram_matrices, with_measured_update, with_update
from lightning_mtadam.layers import LayerRule, label_of
from lightning_mtadam.optim import MTAdam
from lightning_mtadam.optim.held import consumes_at_once, held_by
from lightning_mtadam.parameter_names import group_names
from lightning_mtadam.terms import PLACEHOLDER, TermGradients, clean_names


@dataclass
class MeasuredStep:
    """What is known of an optimizer's step between its first backward pass and the optimizer's own.

    Attributes:
        names: of the losses so far, in order, also of those without a graph.
        balancer: what balances them; ``None`` if their sum is trained on.
        beside: their gradients, if nobody else takes them.
    """

    names: dict[str, None] = field(default_factory=dict)
    balancer: MTAdam | Balancer | None = None
    beside: ExtraPass = field(default_factory=ExtraPass)

    @property
    def needs_passes(self) -> bool:
        """Whether nobody holds the gradients of the terms after the backward pass."""
        if isinstance(self.balancer, MTAdam):
            return consumes_at_once(self.balancer)
        return not isinstance(self.balancer, GradientBalancer)

    def measure(self, optimizer: Optimizer, left: Tensor | None = None) -> tuple[GradientStatistics, list[str]] | None:
        """The statistics at each parameter, and the terms; ``None`` if this step has no gradients that are finite.

        It is called when ``p.grad`` is complete. With sharded parameters, and where several processes differentiate
        losses beside the backward pass, it is a collective.

        Args:
            optimizer: whose step it is.
            left: the loss scale that is still in ``p.grad``, if there is one.
        """
        gradients, scales = self._gradients(optimizer)
        if not gradients:
            return None
        parameters, terms = parameters_in(optimizer), self._order(optimizer, gradients)
        none: list[Tensor | None] = [None] * len(parameters)
        rows = [gradients.get(term, none) for term in terms]
        if scales is None:
            update = divided(list(map(sharding.local_gradient, parameters)), left)
            gram = _joined(gram_matrices([*rows, update]), parameters)
            found = with_measured_update(gram) if bool(gram.isfinite().all()) else None
        else:
            gram, known = _joined(gram_matrices(rows), parameters), list(self._terms(optimizer))
            weights = torch.stack([scales[:, known.index(term)] * (term in gradients) for term in terms], 1)
            found = with_update(gram, weights) if bool(gram.isfinite().all()) else None
        return None if found is None else (found, terms)

    def _gradients(self, optimizer: Optimizer) -> tuple[TermGradients, Tensor | None]:
        """By term, and what multiplies them, [P, I], if that is known."""
        mtadam = mtadam_of(optimizer)
        if mtadam is not None:
            held = held_by(mtadam)
            if held is None:
                return {}, None
            return held[0] or self.beside.averaged(), held[1]
        if isinstance(self.balancer, GradientBalancer):
            return self.balancer.held_gradients(), None
        return self.beside.averaged(), None

    def _terms(self, optimizer: Optimizer) -> tuple[str, ...]:
        balancer = mtadam_of(optimizer) or self.balancer
        return () if balancer is None else balancer.terms

    def _order(self, optimizer: Optimizer, gradients: TermGradients) -> list[str]:
        """The terms of this step, in the order of all."""
        here = dict.fromkeys((*self.names, *gradients))
        return sorted(here, key=[*self._terms(optimizer), *here].index)


def by_layer(
    found: GradientStatistics, network: nn.Module, optimizer: Optimizer, rule: LayerRule
) -> tuple[GradientStatistics, list[str]]:
    """Join the statistics of an optimizer's P parameters to those of the layers that are trained, and name these."""
    own = list(network.named_parameters())
    named = dict(zip((id(one) for _, one in own), clean_names([name for name, _ in own]), strict=True))
    parameters, groups = parameters_in(optimizer), optimizer.param_groups
    names = [named.get(id(one), f"{PLACEHOLDER}{index}") for index, one in enumerate(parameters)]
    owners = [name for name, group in zip(group_names(groups), groups, strict=True) for _ in group["params"]]
    trained = [index for index, one in enumerate(parameters) if one.requires_grad]
    labels = [label_of(rule, names[index], names[index], owners[index]) for index in trained]
    layers = list(dict.fromkeys(labels))
    layer_of = torch.tensor([layers.index(label) for label in labels], device="cpu")
    chosen = GradientStatistics(found.gram[trained], found.parts[trained])
    return chosen.by_layer(layer_of, len(layers)), layers


def _joined(gram: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The inner products at whole parameters, [P, n, n], from those of this process's parts."""
    cuts = list(map(sharding.sharding_of, parameters))
    for cut in dict.fromkeys(cuts):  # in one order on all processes
        if cut is not None:
            rows = [row for row, other in enumerate(cuts) if other == cut]
            gram[rows] = sharding.add_up(gram[rows].to(parameters[rows[0]].device), cut).to(gram)
    return gram
