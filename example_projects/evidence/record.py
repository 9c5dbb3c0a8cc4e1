"""A run as a line of the file: what makes it what it is, and what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch

import lightning_mtadam
from example_projects.common.run_file import Run
from example_projects.evidence.problems.problem import Part, Problem
from example_projects.evidence.search import Candidate
from example_projects.evidence.training import Outcome

KEY = ("problem", "method", "factor", "stage", "seed", "lr", "weights", "steps")


def key_of(run: Run) -> tuple[str, ...]:
    """What makes a run what it is."""
    return tuple(run[name] for name in KEY)


def what(
    problem: Problem, method: str, factor: float, stage: str, seed: int, chosen: Candidate, steps: int
) -> dict[str, str]:
    """A run that is to be made."""
    weights = "" if chosen.shares is None else json.dumps(dict(chosen.shares))
    values = (problem.name, method, f"{factor:g}", stage, str(seed), f"{chosen.lr:g}", weights, str(steps))
    return dict(zip(KEY, values, strict=True))


def finished(run: Run, problem: Problem, outcome: Outcome, seconds: float | None = None) -> dict[str, str]:
    """The run with what came of it; it has failed if it has on any part that it was measured on."""

    def counting(part: Part) -> str:
        return f"{outcome.figures[part][problem.figure]:.6g}" if part in outcome.figures else ""

    return {
        **run,
        "seconds": f"{outcome.seconds if seconds is None else seconds:.4f}",
        "figure": problem.figure,
        "better": "higher" if problem.higher_is_better else "lower",
        "validation": counting("validation"),
        "test": counting("test"),
        "failed": str(int(any(problem.failed(figures) for figures in outcome.figures.values()))),
        "figures": json.dumps({part: dict(figures) for part, figures in outcome.figures.items()}),
        "lightning_mtadam": lightning_mtadam.__version__,
        "torch": torch.__version__,
    }


def candidate_of(run: Run) -> Candidate:
    """What a run was tried with."""
    return Candidate(float(run["lr"]), json.loads(run["weights"]) if run["weights"] else None)


def loss_of(run: Run, part: Part) -> float:
    """The figure that counts, so that the smaller is the better; infinite if the run diverged."""
    value = float(run[part])
    signed = -value if run["better"] == "higher" else value
    return signed if math.isfinite(signed) else math.inf


def best_of(trials: Sequence[Run]) -> Run:
    """The trial with the best validation figure, of those that have not failed, if there are any."""
    return min(trials, key=lambda run: (run["failed"] == "1", loss_of(run, "validation")))


def matching(runs: Sequence[Run], **wanted: str) -> list[Run]:
    """The runs with these values.

    Example:
        >>> matching([{"stage": "test", "seed": "0"}, {"stage": "search", "seed": "0"}], stage="test")
        [{'stage': 'test', 'seed': '0'}]
    """
    return [run for run in runs if all(run[name] == value for name, value in wanted.items())]


def chosen_tests(runs: Sequence[Run]) -> list[Run]:
    """The test runs of one method, problem and factor that were made with what its search has found best."""
    trials = matching(runs, stage="search")
    if not trials:
        return []
    best = best_of(trials)
    return matching(runs, stage="test", lr=best["lr"], weights=best["weights"])
