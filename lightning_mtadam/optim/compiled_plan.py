"""What a step does to the tables, as one compiled call in place of some hundred small operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.optim.compiled import refusal, with_own_code
from lightning_mtadam.optim.decays import Decays
from lightning_mtadam.optim.kernels import Coefficients
from lightning_mtadam.optim.plan import Plan

Planned: TypeAlias = Callable[[Tensor, Tensor, Tensor, Decays, Tensor | None], tuple[Tensor, Coefficients]]


class CompiledPlan:
    """As the plan it is made of. Each kind of step is compiled when it first comes, before anything is changed."""

    def __init__(self, plan: Plan) -> None:
        self.measured = _compiled(plan, Plan.measured)
        self.light = _compiled(plan, Plan.light)


def _compiled(plan: Plan, method: Callable[..., tuple[Tensor, Coefficients]]) -> Planned:
    """The method as a program of its own: the tables of another optimizer are no reason to compile it anew."""
    joined = torch.compile(with_own_code(method, method.__name__), fullgraph=True, dynamic=False)
    ran = False

    def call(
        observed: Tensor, touched: Tensor, third: Tensor, decays: Decays, finite: Tensor | None
    ) -> tuple[Tensor, Coefficients]:
        nonlocal ran
        try:
            planned: tuple[Tensor, Coefficients] = joined(plan, observed, touched, third, decays, finite)
        except Exception as error:
            if ran:
                raise
            raise refusal(observed.device, error) from error
        ran = True
        return planned

    return call
