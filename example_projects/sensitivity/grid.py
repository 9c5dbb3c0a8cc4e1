"""The grid: what multiplies the losses at each spread, and what is trained unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping

from example_projects.problems.problem import Problem

SPREADS = (1e-4, 1e-2, 1.0, 1e2, 1e4)
LRS = (1e-3, 3e-3, 1e-2, 3e-2)

# Few, for thousands of runs: Adam with good weights is past its steep descent at the better learning rates.
STEPS = {"digits": 150, "equation": 400, "autoencoder": 150}


def first_term(problem: Problem) -> str:
    """The term that is never multiplied: MTAdam's anchor, or the first where the anchor is a policy."""
    return problem.anchor if problem.anchor in problem.terms else problem.terms[0]


def factors(problem: Problem, spread: float) -> Mapping[str, float]:
    """What multiplies each loss, unknown to the methods.

    One term keeps its loss. The others are multiplied by factors that go in equal ratios up, or down, to the spread:
    of two losses the second by the spread, of ten the last by it and each by as much more than the one before.

    Args:
        problem: whose losses they are.
        spread: the last factor.
    """
    kept = first_term(problem)
    others = [term for term in problem.terms if term != kept]
    return {kept: 1.0, **{term: spread ** (rank / len(others)) for rank, term in enumerate(others, start=1)}}
