"""What a step does to the tables of the balance, and the coefficients of the update that follow.

Tables are small and the operations on them many, so that on large networks they are nothing, on small ones much of a
step: with ``compile=True`` they are joined to one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtadam.optim.balance import Balance
from lightning_mtadam.optim.decays import Decays
from lightning_mtadam.optim.kernels import Coefficients
from lightning_mtadam.optim.options import Options


class Plan:
    """From the norms of a step's gradients to the coefficients of ``P`` parameters, with ``I`` terms.

    Args:
        options: the optimizer's options.
        balance: the tables.
        amsgrad: whether any group has it.
    """

    def __init__(self, options: Options, balance: Balance, *, amsgrad: bool) -> None:
        self.options, self.balance, self.amsgrad = options, balance, amsgrad

    def measured(
        self, observed: Tensor, touched: Tensor, present: Tensor, decays: Decays, finite: Tensor | None
    ) -> tuple[Tensor, Coefficients]:
        """A step with the gradients of every term.

        Args:
            observed: [P, I], the norms of the gradients.
            touched: [P, 1] bool, whether any term's graph reached the parameter.
            present: [I] bool, whether the term is in this step's losses.
            decays: of the groups.
            finite: a boolean scalar; where it is false nothing may change. ``None``: it is known to be true.

        Returns:
            The scales, [L, I], and the coefficients of all parameters.
        """
        self.balance.average(observed, touched, present, decays, finite)
        self.balance.tick(observed > 0, touched, finite)
        scales = self.balance.scales(decays)
        self.balance.record(scales, finite)
        return scales, self._coefficients(scales, decays, finite)

    def light(
        self, observed: Tensor, touched: Tensor, frozen: Tensor, decays: Decays, finite: Tensor | None
    ) -> tuple[Tensor, Coefficients]:
        """A step with the gradient of the sum of the terms, each multiplied by its scale already.

        The arguments are those of ``measured``, but for ``observed``, [P, 1], and ``frozen``, the scales [L, I].

        Returns:
            Scales of one, [L, 1], and the coefficients.
        """
        self.balance.tick(torch.zeros_like(observed, dtype=torch.bool), touched, finite)
        self.balance.record(frozen, finite)
        scales = torch.ones_like(frozen[:, :1])
        return scales, self._coefficients(scales, decays, finite)

    def _coefficients(self, scales: Tensor, decays: Decays, finite: Tensor | None) -> Coefficients:
        """The coefficients of all parameters: [P, I] or [P, 1] each."""
        balance, denominator = self.balance, self.options.denominator
        shared, own = balance.table.clocks[:, :1], balance.table.clocks[:, 1:]
        squares = shared if denominator == "sum" else own
        weights = balance.weights(squares, decays)
        first, second = self.options.moments(len(balance.terms))
        factor = balance.correction(own if denominator == "own" else shared, decays.first) * (first / second)
        reaching: Tensor | None = None
        if "mean" in (denominator, self.options.update):
            reaching = (own > 0).sum(1, keepdim=True).clamp(min=1).to(scales)
        if reaching is not None and self.options.update == "mean":
            factor = factor * reaching
        if finite is not None:
            weights, factor = torch.where(finite, weights, 0), torch.where(finite, factor, torch.inf)
        return Coefficients(
            scales=balance.by_parameter(scales),
            weights=weights,
            factor=factor,
            reaching=reaching if denominator == "mean" else None,
            correction=balance.correction(squares, decays.second) if self.amsgrad else None,
        )
