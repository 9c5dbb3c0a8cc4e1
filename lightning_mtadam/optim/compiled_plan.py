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
    """The method as a program of its own for each number of threads.

    The tables of another optimizer are then no reason to compile it anew; and torch, which does so for other numbers of
    threads, refuses more than a few programs of the same code.
    """
    programs: dict[int, Callable[..., tuple[Tensor, Coefficients]]] = {}

    def call(
        observed: Tensor, touched: Tensor, third: Tensor, decays: Decays, finite: Tensor | None
    ) -> tuple[Tensor, Coefficients]:
        threads = torch.get_num_threads()
        if threads in programs:
            return programs[threads](plan, observed, touched, third, decays, finite)
        program = torch.compile(with_own_code(method, method.__name__), fullgraph=True, dynamic=False)
        try:
            planned: tuple[Tensor, Coefficients] = program(plan, observed, touched, third, decays, finite)
        except Exception as error:
            raise refusal(observed.device, error) from error
        programs[threads] = program
        return planned

    return call
