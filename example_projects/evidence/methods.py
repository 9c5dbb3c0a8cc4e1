"""The methods that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import Adam

from example_projects.evidence.method import Losses, Method, Setup, Training
from example_projects.evidence.momentum_config import BETA1, MomentumConFIG
from example_projects.evidence.problems.problem import Problem
from lightning_mtadam import MTAdam, export_weights
from lightning_mtadam.balancers import (
    Balancer,
    GradNorm,
    MetaBalance,
    SharedLayerBalancer,
    TorchJDBalancer,
    UncertaintyWeighting,
)

RECOMMENDED: Mapping[str, Any] = {"balance_every": 50}  # what the documents recommend, its learning rate aside

FIRST_BATCHES = 5  # over so many the first losses are averaged: a term may be absent from one
EXPORTED_SHARE = 10  # weights are exported after one in so many steps
GRADNORM_ALPHA = {"gradnorm_toy": 0.12}  # its paper's for its toy; elsewhere the default


def adam(setup: Setup, weights: Mapping[str, float] | None = None) -> Training:
    """Adam on a weighted sum; without weights, on the sum."""

    def backward(losses: Losses) -> None:
        terms = losses.items()
        torch.stack([loss if weights is None else weights[name] * loss for name, loss in terms]).sum().backward()

    return Training(Adam(setup.network.parameters(), lr=setup.lr, fused=True), backward)


def adam_searched(setup: Setup) -> Training:
    """Adam on the losses over their first values, each times its share; without shares, on the sum."""
    if setup.shares is None:
        return adam(setup)
    first = first_losses(setup)
    return adam(setup, {name: share / first[name] for name, share in setup.shares.items()})


def first_losses(setup: Setup) -> dict[str, float]:
    """The mean of each loss over some batches, before training."""
    found: dict[str, list[float]] = {name: [] for name in setup.problem.terms}
    for batch in setup.batches(FIRST_BATCHES):
        for name, loss in setup.losses(setup.network, batch).items():
            found[name].append(loss.item())
    return {name: sum(values) / len(values) or 1.0 for name, values in found.items()}


def mtadam(setup: Setup, **options: Any) -> Training:
    """MTAdam."""
    optimizer = MTAdam(setup.network.parameters(), lr=setup.lr, terms=setup.problem.terms, **options)
    return Training(optimizer, optimizer.backward)


def adam_exported(setup: Setup) -> Training:
    """Adam on constant weights, exported from a short run with MTAdam of another network."""
    network = setup.problem.make_network(setup.seed)
    optimizer = MTAdam(network.parameters(), lr=setup.lr, terms=setup.problem.terms)
    for batch in setup.batches(max(1, setup.steps // EXPORTED_SHARE)):
        optimizer.zero_grad()
        optimizer.backward(setup.losses(network, batch))
        optimizer.step()
    return adam(setup, export_weights(optimizer))


def balanced_by(make: Callable[[Problem], Balancer], setup: Setup) -> Training:
    """Adam on the gradient that a balancer makes."""
    balancer = make(setup.problem)
    balancer.attach(setup.network)
    learned = [] if balancer.learned is None else [*balancer.learned.parameters()]
    optimizer = Adam([*setup.network.parameters(), *learned], lr=setup.lr, fused=True)
    return Training(optimizer, partial(balancer.backward, optimizer=optimizer, model=setup.network))


def gradnorm(problem: Problem) -> Balancer:
    """At the last shared layer."""
    alpha = GRADNORM_ALPHA.get(problem.name, 1.5)
    return GradNorm(problem.shared, alpha=alpha, initial_losses=FIRST_BATCHES, terms=problem.terms)


def uncertainty(problem: Problem) -> Balancer:
    """The log variances are learned by the same Adam as the network."""
    return UncertaintyWeighting(problem.terms)


def metabalance(problem: Problem) -> Balancer:
    """Its target is the main term, or the mean of all."""
    return MetaBalance(anchor=problem.anchor, terms=problem.terms)


def upgrad(problem: Problem) -> Balancer:
    """TorchJD's, on rows of unit norm."""
    from torchjd.aggregation import UPGrad  # an extra: the other methods do without

    return TorchJDBalancer(UPGrad(), terms=problem.terms)


def config(problem: Problem) -> Balancer:
    """TorchJD's, on rows as they are: it brings them to unit norm itself."""
    from torchjd.aggregation import ConFIG

    return TorchJDBalancer(ConFIG(), normalize=False, terms=problem.terms)


def m_config(setup: Setup) -> Training:
    """ConFIG of momenta, one backward pass a step."""
    momenta = MomentumConFIG(setup.network, setup.problem.terms)
    return Training(Adam(setup.network.parameters(), lr=setup.lr, betas=(BETA1, 0.999), fused=True), momenta.backward)


def shared_layer(problem: Problem) -> Balancer:
    """The closed form at the last shared layer."""
    return SharedLayerBalancer(problem.shared, terms=problem.terms)


def famo(setup: Setup) -> Training:
    """TorchJD's FAMO, which sees at each batch what the step before has changed, as in its authors' toy."""
    from torchjd.scalarization import FAMO

    scalarizer, terms = FAMO(len(setup.problem.terms)), setup.problem.terms
    latest = dict.fromkeys(terms, torch.tensor(1.0))
    begun = False

    def backward(losses: Losses) -> None:
        nonlocal begun
        present = {name: loss for name, loss in losses.items() if loss > 0}
        values = torch.stack([present.get(name, latest[name]) for name in terms])  # an absent one has not changed
        if begun:
            scalarizer.update(values)
        latest.update({name: loss.detach() for name, loss in present.items()})
        begun = True
        scalarizer(values).backward()

    return Training(Adam(setup.network.parameters(), lr=setup.lr, fused=True), backward)


METHODS = {
    "adam_sum": Method(adam, "Adam, sum"),
    "adam_searched": Method(adam_searched, "Adam, searched weights", searches_weights=True),
    "mtadam_paper": Method(mtadam, "MTAdam, paper"),
    "recommended": Method(partial(mtadam, **RECOMMENDED), "MTAdam, recommended"),
    "adam_exported": Method(adam_exported, "Adam, exported weights"),
    "gradnorm": Method(partial(balanced_by, gradnorm), "GradNorm"),
    "uncertainty": Method(partial(balanced_by, uncertainty), "uncertainty"),
    "metabalance": Method(partial(balanced_by, metabalance), "MetaBalance"),
    "upgrad": Method(partial(balanced_by, upgrad), "UPGrad"),
    "config": Method(partial(balanced_by, config), "ConFIG"),
    "m_config": Method(m_config, "M-ConFIG"),
    "famo": Method(famo, "FAMO"),
    "shared_layer": Method(partial(balanced_by, shared_layer), "shared layer"),
}
