"""Uncertainty weighting: a weight per term, learned as the term's variance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mtadam.balancers.balancer import Balancer, parameters_in
from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.balancers.log_variances import LogVariances
from lightning_mtadam.distributed.averaging import mean_over
from lightning_mtadam.distributed.processes import Processes


class UncertaintyWeighting(Balancer):
    r"""Uncertainty weighting (Kendall et al. 2018): each term is divided by a variance that is learned beside it.

    For I terms::

        loss        = sum_i (exp(-s_i) L_i + s_i) / 2        s_i = log sigma_i^2
        dloss/ds_i  = (1 - exp(-s_i) L_i) / 2                zero at s_i = log L_i

    One backward pass. The log variances are the parameter of the module ``learned``, which a
    :class:`~lightning_mtadam.MultiTermLightningModule` registers as its ``learned_balance``: the optimizer that is
    given ``self.parameters()`` learns them with its own learning rate. The parameter has ``requires_grad=False``, and
    gets its gradient all the same. It is empty until the terms are known. A term that is absent in a step has no part
    in it.

    Args:
        terms: the names of the losses, if known ahead; otherwise they are taken from the first losses.

    Raises:
        ValueError: the optimizer does not hold the log variances, or has made its state for them before the terms were
            known; they were learned for another number of terms; parameters are sharded.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(3, 2)
        >>> balancer = UncertaintyWeighting()
        >>> optimizer = torch.optim.SGD([*model.parameters(), *balancer.learned.parameters()], lr=0.1)
        >>> output = model(torch.ones(4, 3))
        >>> losses = {"fit": (output - 9).square().mean(), "size": 0.01 * output.abs().mean()}
        >>> _ = balancer.backward(losses, optimizer, model=model)
        >>> optimizer.step()
        >>> {name: bool(weight > 0.5) for name, weight in balancer.term_weights().items()}
        {'fit': False, 'size': True}

    References:
        Kendall, Gal, Cipolla: Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics,
        CVPR 2018, equation 7, with log variances as its section 3.2 recommends. The factor of one half, which there
        belongs to squared errors, is kept for every term.
    """

    has_objective: ClassVar[bool] = True
    learned: LogVariances

    def __init__(self, terms: Iterable[str] | None = None) -> None:
        super().__init__(terms)
        self.learned = LogVariances(len(self._terms))

    def term_weights(self) -> dict[str, Tensor]:
        """The weights ``exp(-s_i) / 2``."""
        weights = (0.5 * torch.exp(-self._log_variances(len(self._terms)))).unbind()
        return dict(zip(self._terms, weights, strict=False))  # loaded ones have no names before the first losses

    def _log_variances(self, terms: int) -> Tensor:
        """s_i, [I], as they are before the step."""
        held = self.learned.log_variances.detach().clone()
        return held if len(held) == terms else held.new_zeros(terms)

    def check(self, batch: Batch, optimizer: Optimizer) -> None:
        """As of every balancer."""
        super().check(batch, optimizer)
        parameter, terms = self.learned.log_variances, self._terms or tuple(batch.losses)
        if not any(held is parameter for held in parameters_in(optimizer)):
            raise ValueError(
                "The optimizer does not hold the log variances that UncertaintyWeighting learns, so they would stay as"
                " they are. In configure_optimizers give it all of self.parameters(), also those without requires_grad;"
                " without Lightning add balancer.learned.parameters()."
            )
        if self.learned.size not in (0, len(terms)):
            raise ValueError(
                f"UncertaintyWeighting has learned {self.learned.size} log variances, but the losses are {terms}. Begin"
                " with all the losses that they were learned for, or give their names, UncertaintyWeighting(terms=...)."
            )
        state = optimizer.state.get(parameter, {}).values()
        if any(isinstance(value, Tensor) and value.shape == (0,) for value in state):
            raise ValueError(
                f"{type(optimizer).__name__} has made its state for the log variances before it was known how many"
                f" there are. Give the names of the losses ahead, UncertaintyWeighting(terms={terms})."
            )

    def balance(self, batch: Batch) -> Tensor:
        """As of every balancer."""
        log_variances = self._log_variances(len(batch.terms))
        weights = 0.5 * torch.exp(-log_variances)
        weighted = batch.run_weighted(weights)
        found = ((0.5 - weighted).to(weights) * batch.factor.to(weights)).unbind()
        by_name, zero = dict(zip(batch.losses, found, strict=True)), torch.zeros_like(weights[0])
        self._add(torch.stack([by_name.get(name, zero) for name in batch.terms]), batch.processes)
        present = torch.stack([log_variances[batch.terms.index(name)] for name in batch.losses])
        return weighted.sum() + present.sum() / 2

    def _add(self, gradient: Tensor, processes: Processes) -> None:
        """Add to the gradient of the log variances, and average it as ``DistributedDataParallel`` does the others."""
        parameter = self.learned.log_variances
        summed = gradient if parameter.grad is None else parameter.grad + gradient
        if processes.group is not None and processes.averages:
            summed = mean_over(summed, processes.group)
        self.learned.grow(len(summed))
        parameter.grad = summed
