"""Rules that turn what was measured in a trial into advice: pure functions of tables.

Shapes: ``T`` reports in the order of their steps, ``I`` terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Recommendation = Literal["leave", "reweight", "balance", "conflict-aware"]

EVERY = 50
"""The ``balance_every`` that is advised."""
UNBALANCED = 10.0
"""Gradients that differ by a larger factor are unbalanced: the smaller one hardly moves what both of them reach."""
CHANGED = 5.0
"""Where the balance of two terms moves by a larger factor in the course of a trial, constant weights will not do."""
OPPOSED = -0.5
"""Terms are in conflict where the median cosine of their gradients is below this; penalties oppose a fit by less."""
ACTIVE = 0.1
"""A term whose gradient's norm is a smaller part of its largest has no more to ask for: it is satisfied."""
SOON = 0.25
"""A term is satisfied at once if it is so from this part of a trial on."""
IN_COMMAND = 100.0
"""A term whose gradient begins larger by this factor sets the steps of the others, even if it vanishes soon."""


@dataclass(frozen=True)
class Course:
    """What a trial measured.

    Attributes:
        terms: names.
        steps: of the reports, [T].
        losses: as they were given, [T, I]; nan where a term was absent.
        norms: of the raw gradients over the network, [T, I]; zero where a term has none.
        compared: the logarithm of each term's norm over each other's, where they meet, [T, I, I]; nan where nothing
            joins the two, or one has no gradient.
        cosines: of the raw gradients, [T, I, I]; nan where one of the two has none.
    """

    terms: tuple[str, ...]
    steps: tuple[int, ...]
    losses: Tensor
    norms: Tensor
    compared: Tensor
    cosines: Tensor


@dataclass(frozen=True)
class Advice:
    """What follows from a course.

    Attributes:
        recommendation: what to do.
        weights: what each loss would be multiplied by to make gradients equal on average, the first term's being 1; all
            1 where the losses are best left as they are.
        ratio: by which factor gradients of different terms differ, at the median of the reports in which both have
            something to ask for; satisfied terms aside.
        change: by which factor the balance of two terms moves from the first third of the reports to the last.
        dead: terms that never have a gradient.
        satisfied: terms whose gradient soon vanishes beside those of the others.
        conflicts: pairs of terms that pull against each other, with the median of their cosine.
    """

    recommendation: Recommendation
    weights: dict[str, float]
    ratio: float
    change: float
    dead: tuple[str, ...]
    satisfied: tuple[str, ...]
    conflicts: dict[tuple[str, str], float]


def advise(course: Course) -> Advice:
    """Say what to do about several losses, from a course of measurements.

    In this order: terms that pull against each other need an aggregator that knows of it. Terms whose gradients are
    alike, or differ only because one is satisfied, are left as they are. Of the others constant weights will do for
    those whose balance stays as it is, and the rest are to be balanced while they train.

    Args:
        course: of at least two terms and two reports.

    Example:
        >>> flat = torch.zeros(6, 2)
        >>> off = math.log(1e4) * torch.tensor([[0.0, -1.0], [1.0, 0.0]]).expand(6, 2, 2)
        >>> apart = torch.eye(2).expand(6, 2, 2)
        >>> found = advise(Course(("a", "b"), tuple(range(6)), flat, flat + 1, off, apart))
        >>> found.recommendation, found.weights["b"]
        ('reweight', 0.0001)
    """
    alive = (course.norms > 0).any(0)
    satisfied = alive & satisfied_at_once(course)
    counted = alive & ~satisfied
    conflicts = opposed_pairs(course, counted)
    compared = while_active(course)
    ratio, change = _spread(compared[:, counted][:, :, counted])
    recommendation: Recommendation
    if conflicts:
        recommendation = "conflict-aware"
    elif ratio < UNBALANCED:
        recommendation = "leave"
    else:
        recommendation = "reweight" if change < CHANGED else "balance"
    return Advice(
        recommendation,
        _weights(course.terms, compared, counted) if ratio >= UNBALANCED else dict.fromkeys(course.terms, 1.0),
        ratio,
        change,
        _named(course, ~alive),
        _named(course, satisfied),
        conflicts,
    )


def satisfied_at_once(course: Course) -> Tensor:
    """Which terms soon ask for next to nothing, while others go on: [I], bool.

    The gradient of such a term has fallen below :data:`ACTIVE` of its largest by the time that is called
    :data:`SOON`, stays there, and is smaller than the others' from then on. To balance it would amplify it. One that
    was :data:`IN_COMMAND` before is no such term: it had its way because its scale is off.
    """
    late = slice(math.ceil(SOON * len(course.steps)), None)
    low = (course.norms[late] <= ACTIVE * course.norms.amax(0)).all(0)
    beside = course.compared[late].nanmedian(0).values.nan_to_num(-math.inf)  # zero by now: the smallest there is
    falls = low & (beside.fill_diagonal_(-math.inf).amax(1) < 0)
    commands = while_active(course).nan_to_num(-math.inf).amax((0, 2)) > math.log(IN_COMMAND)
    return falls & ~commands & ~low.all()


def while_active(course: Course) -> Tensor:
    """What is compared of each two terms, [T, I, I], with nan where one of the two has no more to ask for.

    That is where its gradient has fallen below :data:`ACTIVE` of the largest so far, and is the smaller of the two. How
    small it has become tells how well it is satisfied, not how its loss is scaled.
    """
    low = course.norms <= ACTIVE * course.norms.cummax(0).values
    spent = low[:, :, None] & (course.compared < 0)
    return course.compared.masked_fill(spent | spent.mT, torch.nan)


def opposed_pairs(course: Course, counted: Tensor) -> dict[tuple[str, str], float]:
    """Pairs of counted terms whose gradients oppose each other in most reports in which both have something to ask for.

    Gradients that have nearly vanished are left out: at the end of training those of all terms together add up to
    zero, so that any two of them point apart.

    Args:
        course: of the trial.
        counted: which terms, [I], bool.

    Returns:
        The median cosine of each such pair.
    """
    active = course.norms > ACTIVE * course.norms.amax(0)
    found = {}
    for i, j in torch.combinations(counted.nonzero().flatten()).tolist():
        cosines = course.cosines[:, i, j]
        cosines = cosines[active[:, i] & active[:, j] & cosines.isfinite()]
        if 2 * len(cosines) < len(course.steps):
            continue
        median = float(cosines.median())
        if median < OPPOSED:
            found[course.terms[i], course.terms[j]] = median
    return found


def _spread(compared: Tensor) -> tuple[float, float]:
    """The factor between the largest and the smallest gradient, and by how much a balance of two moves."""
    third = max(1, len(compared) // 3)
    middle, first, last = (rows.nanmedian(0).values for rows in (compared, compared[:third], compared[-third:]))
    return _largest(middle), _largest(last - first)


def _largest(logs: Tensor) -> float:
    """Of factors, from their logarithms; 1 if there are none."""
    return max((math.exp(abs(log)) for log in logs.flatten().tolist() if math.isfinite(log)), default=1.0)


def _weights(terms: tuple[str, ...], compared: Tensor, counted: Tensor) -> dict[str, float]:
    """The inverse of each norm over that of the first, in the geometric mean of the reports, of terms that count."""
    first = int(counted.nonzero()[0])
    logs = compared[:, :, first].nanmean(0).masked_fill(~counted, torch.nan).tolist()
    return {
        term: float(f"{math.exp(-log):.3g}") if math.isfinite(log) else 1.0
        for term, log in zip(terms, logs, strict=True)
    }


def _named(course: Course, chosen: Tensor) -> tuple[str, ...]:
    return tuple(term for term, this in zip(course.terms, chosen.tolist(), strict=True) if this)
