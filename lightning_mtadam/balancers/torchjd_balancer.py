"""Aggregators of TorchJD, on the gradients of the terms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mtadam import balancing
from lightning_mtadam.balancers.aggregator_memory import Aggregator, AggregatorMemory, is_of_torchjd
from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.balancers.gradient_balancer import GradientBalancer, StepGradients
from lightning_mtadam.constants import constant
from lightning_mtadam.finite import Sent
from lightning_mtadam.terms import NonFiniteError, is_host, non_finite, plain


class TorchJDBalancer(GradientBalancer):
    r"""The gradient that an aggregator of TorchJD (Quinton & Rey 2024) makes of the terms' gradients.

    The matrix ``J`` has a row for each term of the step, its gradient by all parameters that the optimizer trains::

        p.grad = A(J),   with J[i] <- J[i] / ||J[i]|| if normalize

    Several aggregators are numerically wrong where the norms of rows lie far apart, and most of them give the longer
    rows more weight; rows of unit norm make the result independent of any constant factor on a loss. A row of zeros
    stays as it is, and one that is too small to have a norm becomes zeros. Terms that are absent in a step have no
    row in it.

    Rows are averaged over the processes first, and every process makes the same of them. What an aggregator draws
    depends on the seed and the step alone. Its state (numbers, tensors and arrays among its attributes that calls
    change, as in ``GradVac``, ``NashMTL`` or ``CRMOGMWeighting``) is in the checkpoint.

    Args:
        aggregator: of ``torchjd.aggregation``, e.g. ``UPGrad()``; or whatever makes a vector [n] of a matrix [I, n].
            It is this balancer's alone.
        normalize: whether to bring the rows to unit norm.
        seed: of what is drawn.
        terms: the names of the losses, if known ahead.

    Raises:
        TypeError: the aggregator cannot be called, is a scalarizer, which ``ScalarizerBalancer`` runs, or does
            not return a tensor.
        ValueError: it returns a tensor of another shape.
        NonFiniteError: it makes inf or nan of finite gradients.

    Example:
        >>> from torchjd.aggregation import PCGrad
        >>> w = nn.Parameter(torch.zeros(2))
        >>> model = nn.ParameterList([w])
        >>> balancer = TorchJDBalancer(PCGrad())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> balancer.backward({"up": 100 * w[0], "aside": w[1] - w[0]}, optimizer, model=model)
        >>> w.grad  # each without its part against the other
        tensor([0.5000, 1.2071])
        >>> balancer.term_weights()
        {'up': tensor(0.0171), 'aside': tensor(1.2071)}

    References:
        Quinton, Rey: Jacobian Descent for Multi-Objective Optimization, 2024; https://torchjd.org. There rows are
        taken as they are, which ``normalize=False`` does.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        normalize: bool = True,
        seed: int = 0,
        terms: Iterable[str] | None = None,
    ) -> None:
        super().__init__(terms)
        if is_of_torchjd(aggregator, "scalarization", "Scalarizer"):
            raise TypeError(
                f"{type(aggregator).__name__} is a scalarizer, which makes one loss of the losses. Give it to"
                f" ScalarizerBalancer: ScalarizerBalancer({type(aggregator).__name__}(...))."
            )
        if not callable(aggregator):
            raise TypeError(
                f"aggregator must make a vector of a matrix, but a {type(aggregator).__name__} cannot be called. Give"
                " e.g. torchjd.aggregation.UPGrad()."
            )
        self.aggregator, self.normalize, self.seed = aggregator, normalize, plain(seed)
        self._memory = AggregatorMemory(aggregator)
        self._weighted: bool | None = None  # whether its weights are what multiplies the rows
        self._sent: Any = None  # of the last step on an accelerator, whether all was finite
        self._scaled = False  # whether a gradient scaler is to notice what is not finite

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sent": None}

    def place(self, value: Tensor, device: torch.device) -> Tensor:
        """As it is: an aggregator also keeps numbers, which are the host's."""
        return value

    def term_weights(self) -> dict[str, Tensor]:
        """What multiplied each loss in the last step, 0 for absent terms; empty if the aggregator gives no weights."""
        if "weights" not in self.state:
            return {}
        return dict(zip(self._terms, self.state["weights"].unbind(), strict=True))

    def combine(self, step: StepGradients) -> list[Tensor | None]:
        """As of every balancer."""
        host = is_host(step.norms.device)
        if host and not bool(step.finite):  # no aggregator should have to bear it
            self.state = self.state_before
            return step.weighted_sum(torch.ones_like(step.norms))
        state = dict(self.state_before)
        steps = state.pop("steps", torch.zeros((), dtype=torch.int64, device="cpu"))
        state.pop("weights", None)
        present = [at for at, flag in enumerate(step.present) if flag]
        norms = self._divisors(step)
        matrix = step.matrix() / norms[constant(present, torch.int64, norms.device), None]
        if not host:
            matrix = torch.where(step.finite, matrix, 0)
        with _weights_of(self.aggregator) as weights:
            vector, after = self._memory.call(matrix, state, f"{self.seed}/{int(steps)}")
        self._check_shape(vector, matrix)
        if weights and self._are_multiplied(weights[-1], matrix, vector):
            rows = dict(zip(present, weights[-1].to(norms).unbind(), strict=True))
            zero = torch.zeros_like(norms[0])
            after["weights"] = torch.stack([rows.get(at, zero) for at in range(len(norms))]) / norms
        if host:
            self._check_finite(bool(vector.isfinite().all()))
        else:  # the host does not wait for it: what is not finite becomes zero, or nan for a scaler, and is told later
            finite = vector.isfinite().all()
            vector = torch.where(step.finite, torch.where(finite, vector, 0), math.nan if self._scaled else 0)
            after = {key: _unless(step.finite, value, state.get(key)) for key, value in after.items()}
            self._sent = Sent(torch.stack([step.finite, finite])), step, self._terms, self._scaled
        self.state = {**after, "steps": steps + 1}
        return step.split(vector.detach())

    def check(self, batch: Batch, optimizer: Optimizer) -> None:
        """As of every balancer. On an accelerator it also tells what was not finite in the step before."""
        super().check(batch, optimizer)
        self._scaled = batch.loss_scale is not None
        if self._sent is not None:
            (sent, step, terms, scaled), self._sent = self._sent, None
            finite, vector = sent.receive()
            if not (finite or scaled):
                raise non_finite(step.norms, step.layers, terms, "The gradient was taken as zero in that step.")
            self._check_finite(vector)

    def _are_multiplied(self, weights: Tensor, matrix: Tensor, vector: Tensor) -> bool:
        """Whether these are what multiplied the rows; an accelerator is asked for it in the first step only."""
        if self._weighted is None or is_host(matrix.device):
            self._weighted = _multiplied(weights, matrix, vector)
        return self._weighted

    def _divisors(self, step: StepGradients) -> Tensor:
        """By what each row is divided, [I]."""
        if not self.normalize:
            return torch.ones_like(step.norms[0])
        whole = torch.zeros(len(step.norms), dtype=torch.int64, device=step.norms.device)
        (norms,) = balancing.layer_norms(step.norms, whole, 1)
        return torch.where(norms > 0, norms, math.inf)  # what is too small to have a norm becomes zero

    def _check_shape(self, vector: object, matrix: Tensor) -> None:
        name = type(self.aggregator).__name__
        if not isinstance(vector, Tensor):
            raise TypeError(f"The aggregator {name} must return a tensor, but returned a {type(vector).__name__}.")
        if vector.shape != matrix.shape[1:]:
            raise ValueError(
                f"The aggregator {name} must make a vector of shape {tuple(matrix.shape[1:])} of a matrix of shape"
                f" {tuple(matrix.shape)}, but made one of shape {tuple(vector.shape)}. Give an aggregator, not its"
                " weighting."
            )

    def _check_finite(self, finite: bool) -> None:
        if not finite:
            raise NonFiniteError(
                f"The aggregator {type(self.aggregator).__name__} made inf or nan of finite gradients. They are not"
                " used. Take another one, or normalize=True."
            )


def _unless(finite: Tensor, value: Tensor, before: Tensor | None) -> Tensor:
    """A value of the state on an accelerator; the one before where the gradients were not finite."""
    if before is None or before.shape != value.shape or is_host(value.device):
        return value
    return torch.where(finite, value, before.to(value.device))


def _multiplied(weights: Tensor, matrix: Tensor, vector: Tensor) -> bool:
    """Whether these are what multiplied the rows; some aggregators have a weighting for something else."""
    return weights.shape == matrix.shape[:1] and torch.allclose(weights.to(matrix) @ matrix, vector, rtol=1e-4)


@contextmanager
def _weights_of(aggregator: object) -> Iterator[list[Tensor]]:
    """Collects the weights that the aggregator's weighting gives, one tensor for each call; none if it has none."""
    found: list[Tensor] = []
    weighting = getattr(aggregator, "weighting", None)
    if not isinstance(weighting, nn.Module):
        yield found
        return
    hook = weighting.register_forward_hook(lambda module, arguments, output: found.append(output.detach()))
    try:
        yield found
    finally:
        hook.remove()
