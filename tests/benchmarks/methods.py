"""Ways to train on several losses, each as a function that takes a whole step: forward, backward passes, optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam import MTAdam
from tests.benchmarks.authors import AuthorsMTAdam
from tests.benchmarks.networks import Task

LR = 1e-4
PERIOD = 20
Step = Callable[[], None]
TORCHJD = ("torchjd", "quadprog", "qpsolvers")


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        make: makes, from a task, what takes a step.
        period: after how many steps the cost repeats.
        needs: packages that the project does not depend on.
    """

    make: Callable[[Task], Step]
    period: int = 1
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def adam(task: Task) -> Step:
    """Plain Adam on the sum."""
    optimizer = torch.optim.Adam(task.parameters, LR, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(task.losses().values())).sum().backward()
        optimizer.step()

    return step


def mtadam(task: Task, **options: Any) -> Step:
    """Ours."""
    optimizer = MTAdam(task.network.named_parameters(), LR, **options)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(task.losses())
        optimizer.step()

    return step


def authors(task: Task) -> Step:
    """MTAdam as its authors wrote it."""
    optimizer = AuthorsMTAdam(task.parameters, len(task.losses()), LR)
    return lambda: optimizer.step(list(task.losses().values()))


def torchjd(task: Task, parallel_chunk_size: int | None = None) -> Step:
    """TorchJD: the Jacobian of all losses, aggregated by UPGrad."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import backward, jac_to_grad

    optimizer, aggregator = torch.optim.Adam(task.parameters, LR, fused=True), UPGrad()

    def step() -> None:
        optimizer.zero_grad()
        backward(list(task.losses().values()), inputs=task.parameters, parallel_chunk_size=parallel_chunk_size)
        jac_to_grad(task.parameters, aggregator)
        optimizer.step()

    return step


class GradNorm:
    """GradNorm (Chen et al., ICML 2018) with weights ``I softmax(logits)``, by hand.

    Args:
        task: what is trained; the norms are those of its shared weight's gradients.
        alpha: the strength of the pull towards equal training rates.
        lr: learning rate of the weights.
    """

    def __init__(self, task: Task, alpha: float = 1.5, lr: float = 1e-2) -> None:
        self.task, self.alpha = task, alpha
        self.logits = torch.zeros(len(task.losses()), requires_grad=True)
        self.optimizer = torch.optim.Adam(task.parameters, LR, fused=True)
        self.weight_optimizer = torch.optim.Adam([self.logits], lr)
        self.first: Tensor | None = None

    def step(self) -> None:
        """Take a step."""
        losses = torch.stack(list(self.task.losses().values()))
        values = losses.detach()
        self.first = values if self.first is None else self.first
        norms = torch.stack([self._norm(loss) for loss in losses])
        weights = len(losses) * self.logits.softmax(0)
        self.optimizer.zero_grad()
        (weights.detach() * losses).sum().backward()
        self.optimizer.step()
        (self.logits.grad,) = torch.autograd.grad(
            weights, self.logits, weight_gradients(weights.detach(), norms, values / self.first, self.alpha)
        )
        self.weight_optimizer.step()

    def _norm(self, loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, self.task.shared, retain_graph=True)
        return gradient.norm()


def weight_gradients(weights: Tensor, norms: Tensor, progress: Tensor, alpha: float) -> Tensor:
    """The gradient of ``sum_i |G_i - mean(G) r_i^alpha|`` with respect to the weights, the target held fixed.

    Args:
        weights: [I].
        norms: [I], of the unweighted losses' gradients; ``G_i`` is the weight times that.
        progress: [I], each loss over its first value; ``r_i`` is that over its mean.
        alpha: the exponent.

    Returns:
        [I], ``sign(G_i - mean(G) r_i^alpha) norms_i``.
    """
    weighted = weights * norms
    return (weighted - weighted.mean() * (progress / progress.mean()) ** alpha).sign() * norms


METHODS = {
    "Adam on the sum": Method(adam),
    "MTAdam": Method(mtadam),
    "MTAdam, compile": Method(partial(mtadam, compile=True)),
    "MTAdam, low_memory": Method(partial(mtadam, low_memory=True)),
    f"MTAdam, balance_every={PERIOD}": Method(partial(mtadam, balance_every=PERIOD), period=PERIOD),
    "authors' MTAdam": Method(authors),
    "TorchJD UPGrad": Method(torchjd, needs=TORCHJD),
    "TorchJD UPGrad, parallel_chunk_size=1": Method(partial(torchjd, parallel_chunk_size=1), needs=TORCHJD),
    "GradNorm": Method(lambda task: GradNorm(task).step),
}
