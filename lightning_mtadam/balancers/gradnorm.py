"""GradNorm: weights that make the terms learn at one pace, by their gradients at a shared layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mtadam.balancers import gradnorm_rule as rule
from lightning_mtadam.balancers.balancer import Balancer
from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.balancers.shared_layer import check_repeatable, gradient_at, parameters_of, unreached_message
from lightning_mtadam.terms import plain


class GradNorm(Balancer):
    r"""GradNorm (Chen et al. 2018): a weight per term, learned so that the gradients at a shared layer keep pace.

    With ``W`` the weights of the shared layer, for I terms::

        G_i      = ||grad_W (w_i L_i)||
        r_i      = (L_i / L_i(0)) / mean_j (L_j / L_j(0))
        d_i      = log(G_i / r_i^alpha) - mean_j log(G_j / r_j^alpha)
        w        = I softmax(z),   z_i <- z_i - lr clip(d_i, -1, 1)

    The weights settle where the ``G_i`` are to one another as the ``r_i^alpha``, the paper's target. They move by
    ratios: a loss that is off by a factor of 1e4 is brought back in some 300 steps, one that is off by 1e8 in 500. An
    optimizer that remembers the gradients before that, as Adam does, is held back for longer.

    No gradient is differentiated again. The network is trained on ``sum_i w_i L_i`` by one backward pass, with the
    weights as they were before this step; beside it the terms are differentiated down to the shared layer only.

    Args:
        shared: the name of the module or parameter at which gradients are compared, in the network: commonly the last
            layer that all terms share.
        alpha: how strongly terms that learn slowly are favoured; 0 makes all norms equal.
        lr: how fast the weights move: a logit by ``lr`` a step at the most; within a factor of e of the target by that
            part of the way, so that norms are averaged over some ``1 / lr`` steps.
        initial_losses: L_i(0): those of the "first" step; the mean of so many first steps, in which the weights stay
            at one; or given, by term.
        terms: the names of the losses, if known ahead.

    Raises:
        ValueError: an option is out of range; a name that the network has not, or that holds no trained parameter; a
            term that does not reach the shared layer, or that has another gradient there when it is differentiated
            again, as some fused losses have. In the step after it is known: an initial loss that is not above zero;
            with several processes, a term that reaches the shared layer on none of them.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> balancer = GradNorm(shared="0")
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> output = model(torch.ones(8, 4))
        >>> losses = {"fit": (output - 1).square().mean(), "size": 1e3 * output.square().mean()}
        >>> _ = balancer.backward(losses, optimizer, model=model)
        >>> optimizer.step()
        >>> bool(balancer.term_weights()["fit"] > balancer.term_weights()["size"])
        True

    References:
        Chen, Badrinarayanan, Lee, Rabinovich: GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
        Multitask Networks, ICML 2018, Algorithm 1. There the weights themselves are learned, by Adam on ``sum_i |G_i -
        mean_j(G_j) r_i^alpha|``, then renormalised, and can cross zero; here their logarithms move. That gradient is as
        large as the norms are, and Adam remembers the largest: a loss that is off by 1e4 keeps it slow for thousands
        of steps.
    """

    looks_ahead: ClassVar[bool] = True
    has_objective: ClassVar[bool] = True

    def __init__(
        self,
        shared: str,
        alpha: float = 1.5,
        lr: float = 0.025,
        initial_losses: Literal["first"] | int | Mapping[str, float] = "first",
        terms: Iterable[str] | None = None,
    ) -> None:
        given = initial_losses if isinstance(initial_losses, Mapping) else None
        super().__init__(given if terms is None and given is not None else terms)
        alpha, lr, initial_losses = plain((alpha, lr, initial_losses))
        if not lr > 0:
            raise ValueError(f"lr must be above 0, but got {lr!r}.")
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, but got {alpha!r}.")
        if given is not None:
            _check_given(given, self._terms)
        elif initial_losses != "first" and not (isinstance(initial_losses, int) and initial_losses > 0):
            raise ValueError(
                "initial_losses must be 'first', a number of steps above 0 or a mapping of terms to losses, but got"
                f" {initial_losses!r}."
            )
        self.shared, self.alpha, self.lr = shared, alpha, lr
        self._given = None if given is None else [float(given[name]) for name in self._terms]
        self._start_length = initial_losses if isinstance(initial_losses, int) else int(given is None)
        self._started: set[str] = set()  # the terms whose initial losses are known, and were checked
        self._layer: list[Tensor] = []  # the shared parameters
        self._repeated: set[str] = set()  # the terms that were differentiated twice, to see whether they can be
        self._observed = torch.empty(0)  # in this step so far, as the rule has it: [I, HEAD + |W|]

    def term_weights(self) -> dict[str, Tensor]:
        """The weights w_i, which are positive and sum to I."""
        if not self.state:
            return {}
        return dict(zip(self._terms, rule.weights_of(self.state["logits"]).unbind(), strict=True))

    def average_weights(self) -> dict[str, Tensor]:
        """The geometric mean of the weights over the steps so far, [1] for each term; empty before the first."""
        if not self.state:
            return {}
        means = self.state["log_weights"].exp().unbind()
        return {name: mean[None] for name, mean in zip(self._terms, means, strict=True)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As of every balancer."""
        super().load_state_dict(state_dict)
        self._started.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layer": []}

    def check(self, batch: Batch, optimizer: Optimizer) -> None:
        """As of every balancer."""
        super().check(batch, optimizer)
        self._layer = parameters_of(batch.network, self.shared)

    def balance(self, batch: Batch) -> Tensor:
        """As of every balancer."""
        if batch.begins:
            self._check_first_steps(batch)
        terms, shared, device = batch.terms, self._layer, batch.factor.device
        dtype = torch.promote_types(next(iter(batch.losses.values())).dtype, torch.float32)
        before = self.state_before or rule.beginning(len(terms), self._given, dtype, device)
        seen = torch.zeros(len(terms), rule.HEAD + sum(p.numel() for p in shared), dtype=dtype, device=device)
        for name, loss in batch.losses.items():
            row, gradient = seen[terms.index(name)], gradient_at(shared, loss, batch, dtype)
            if gradient is None and batch.processes.group is None:
                raise ValueError(unreached_message(name))
            if name not in self._repeated:
                check_repeatable(name, gradient, gradient_at(shared, loss, batch, dtype), "GradNorm")
                self._repeated.add(name)
            row[0], row[1] = batch.share, batch.share * loss.detach()
            if gradient is not None:
                row[2], row[rule.HEAD :] = 1, gradient
        observed = seen if batch.begins else self._observed + seen
        after = rule.advance(
            before, batch.mean_over_processes(observed), alpha=self.alpha, lr=self.lr, start_length=self._start_length
        )
        weights = rule.weights_of(before["logits"])
        weighted = batch.run_weighted(weights)
        self._observed, self.state = observed, after
        return weighted.sum()

    def _check_first_steps(self, batch: Batch) -> None:
        """Raise, on all processes, if a term cannot be balanced; the host reads until all initial losses are known."""
        if not self.state_before or self._started.issuperset(batch.losses):
            return
        columns = (self.state_before[key].tolist() for key in ("seen", "reached", "initial_losses"))
        for name, seen, reached, loss in zip(batch.terms, *columns, strict=True):
            if seen < max(self._start_length, 1):
                continue
            if not reached:
                raise ValueError(unreached_message(name))
            if not loss > 0:
                raise ValueError(
                    f"The initial loss of the term {name!r} is {loss}, but GradNorm divides by it: it must be above 0."
                    " Give initial_losses by term, or a number of steps to average, or leave the term out."
                )
            self._started.add(name)


def _check_given(given: Mapping[str, float], terms: tuple[str, ...]) -> None:
    if set(given) != set(terms):
        raise ValueError(f"initial_losses has the terms {tuple(given)}, but terms are {terms}. Give one for each.")
    for name, value in given.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"initial_losses[{name!r}] must be finite and above 0, but is {value!r}.")
