"""The methods that are compared: each prepares an optimizer, and says how gradients come to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from example_projects.problems.problem import Problem
from lightning_mtadam import MTAdam
from lightning_mtadam.balancers import (
    Balancer,
    FixedWeights,
    GradNorm,
    MetaBalance,
    OutputBalancer,
    TorchJDBalancer,
    UncertaintyWeighting,
)
from lightning_mtadam.optim.schedule import is_measured

# The last layer that all terms share, by problem.
SHARED = {"digits": "2", "equation": "layers.6", "autoencoder": "encoder.2"}

# All of the output. The equation has none to balance at: its residual is made of derivatives by the input.
OUTPUT = {"digits": "2", "autoencoder": "both"}

Factors: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Training:
    """How one network is trained.

    Attributes:
        optimizer: steps on the gradients.
        backward: takes the losses, and leaves gradients.
    """

    optimizer: Optimizer
    backward: Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        prepare: takes the problem, its network, what multiplies its losses (only the oracle looks at that) and the
            learning rate.
        passes: takes the number of terms and of steps; the mean number of backward passes of a step through the
            whole network.
        small_passes: whether there is also one per term through a part of the network.
        problems: that it can be used for; all if ``None``.
    """

    prepare: Callable[[Problem, nn.Module, Factors, float], Training]
    passes: Callable[[int, int], float]
    small_passes: bool = False
    problems: Collection[str] | None = None

    def suits(self, problem: str) -> bool:
        """Whether it can be used for the problem of that name."""
        return self.problems is None or problem in self.problems


def one(terms: int, steps: int) -> float:
    """A backward pass of a weighted sum."""
    return 1.0


def one_per_term(terms: int, steps: int) -> float:
    """A backward pass for each term."""
    return float(terms)


def seldom(terms: int, steps: int, *, every: int) -> float:
    """One for each term in the measured steps, one of the sum in the others."""
    measured = sum(is_measured(step, every) for step in range(steps))
    return 1 + (terms - 1) * measured / steps


def balanced_by(make: Callable[[Problem, Factors], Balancer]) -> Callable[..., Training]:
    """Adam on the gradient that a balancer makes."""

    def prepare(problem: Problem, network: nn.Module, factors: Factors, lr: float) -> Training:
        balancer = make(problem, factors)
        balancer.attach(network)
        learned = [] if balancer.learned is None else [*balancer.learned.parameters()]
        optimizer = Adam([*network.parameters(), *learned], lr=lr, fused=True)
        return Training(optimizer, partial(balancer.backward, optimizer=optimizer, model=network))

    return prepare


def mtadam(**options: Any) -> Callable[..., Training]:
    """MTAdam with the problem's anchor."""

    def prepare(problem: Problem, network: nn.Module, factors: Factors, lr: float) -> Training:
        chosen = {"anchor": problem.anchor, **options}
        optimizer = MTAdam(network.named_parameters(), lr=lr, terms=problem.terms, **chosen)
        return Training(optimizer, optimizer.backward)

    return prepare


def plain_sum(problem: Problem, factors: Factors) -> Balancer:
    """The sum of the losses as they are given."""
    return FixedWeights(dict.fromkeys(problem.terms, 1.0))


def by_hand(problem: Problem, factors: Factors) -> Balancer:
    """The oracle: undoes the factors, and has the weights that are known to be good."""
    return FixedWeights({term: weight / factors[term] for term, weight in problem.balanced_weights.items()})


def gradnorm(problem: Problem, factors: Factors) -> Balancer:
    """Initial losses over five batches: a class may be absent from the first."""
    return GradNorm(SHARED[problem.name], initial_losses=5, terms=problem.terms)


def uncertainty(problem: Problem, factors: Factors) -> Balancer:
    """The log variances are learned by the same Adam as the network."""
    return UncertaintyWeighting(problem.terms)


def metabalance(problem: Problem, factors: Factors) -> Balancer:
    """With MTAdam's anchor."""
    return MetaBalance(relax=0.7, anchor=problem.anchor, terms=problem.terms)


def at_output(problem: Problem, factors: Factors) -> Balancer:
    """EnCodec's."""
    return OutputBalancer(OUTPUT[problem.name], terms=problem.terms)


def aggregated(aggregator: str) -> Callable[..., Training]:
    """TorchJD's of that name, on rows of unit norm."""

    def make(problem: Problem, factors: Factors) -> Balancer:
        from torchjd import aggregation  # an extra: the other methods do without

        return TorchJDBalancer(getattr(aggregation, aggregator)(), terms=problem.terms)

    return balanced_by(make)


METHODS = {
    "adam": Method(balanced_by(plain_sum), one),
    "adam-by-hand": Method(balanced_by(by_hand), one),
    "uncertainty": Method(balanced_by(uncertainty), one),
    "gradnorm": Method(balanced_by(gradnorm), one, small_passes=True),
    "output-balancer": Method(balanced_by(at_output), one, small_passes=True, problems=OUTPUT),
    "metabalance": Method(balanced_by(metabalance), one_per_term),
    "pcgrad": Method(aggregated("PCGrad"), one_per_term),
    "aligned-mtl": Method(aggregated("AlignedMTL"), one_per_term),
    "adatask": Method(mtadam(anchor=None, denominator="own"), one_per_term),
    "mtadam": Method(mtadam(), one_per_term),
    **{
        f"mtadam-every-{every}": Method(mtadam(balance_every=every), partial(seldom, every=every))
        for every in (5, 20, 50)
    },
}
