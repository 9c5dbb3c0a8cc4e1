"""Makes the runs that a file does not hold: the search of each method, then fresh seeds with what it has found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from example_projects.common.run_file import Run, append_run, read_runs
from example_projects.evidence.methods import METHODS
from example_projects.evidence.problems.problem import Part, Problem
from example_projects.evidence.record import best_of, candidate_of, finished, key_of, matching, what
from example_projects.evidence.search import FIRST_SEED, USUAL_LR, Candidate, affordable, candidate
from example_projects.evidence.training import Outcome, make_setup, step_by_step, train

BLOCK = 20  # steps of one method, before those of the next, where times are compared


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        methods: by name.
        factors: on the losses.
        seeds: of the test.
        budget: processor seconds for the search of each method, for each problem and factor.
        lr: a learning rate, in place of a search; these runs are kept apart.
        steps: of a run, in place of the problem's.
    """

    methods: Sequence[str]
    factors: Sequence[float]
    seeds: Sequence[int]
    budget: float
    lr: float | None = None
    steps: int | None = None


class Runner:
    """Keeps a file of runs.

    A run is a line, written when it has ended; those that are there are not made again. What interrupts a run loses it
    and no other.

    Args:
        file: a CSV file, which is made if it is not there.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.runs: list[Run] = read_runs(file)

    def carry_out(self, problem: Problem, plan: Plan) -> None:
        """Make what is missing of a plan, for one problem: factor by factor, method by method."""
        for factor in plan.factors:
            for name in plan.methods:
                stage = "test" if plan.lr is None else "given"
                chosen = self._search(problem, name, factor, plan) if plan.lr is None else Candidate(plan.lr)
                for seed in plan.seeds:
                    self._make(problem, name, factor, stage, seed, chosen, plan, ("validation", "test"))

    def time(self, problem: Problem, plan: Plan) -> None:
        """Train with all methods in turn, some steps of each at a time, and keep their seconds; for all seeds."""
        steps = plan.steps or problem.steps
        lr = Candidate(plan.lr or USUAL_LR)
        for seed in plan.seeds:
            planned = {name: what(problem, name, 1.0, "cost", seed, lr, steps) for name in plan.methods}
            if all(self._find(run) for run in planned.values()):
                continue
            for name, seconds in _in_turn(problem, plan.methods, lr.lr, seed, steps).items():
                self._append(finished(planned[name], problem, Outcome({}, seconds, steps)))

    def _search(self, problem: Problem, name: str, factor: float, plan: Plan) -> Candidate:
        """Spend what is left of the budget, and return the best."""
        steps = str(plan.steps or problem.steps)
        own = {"problem": problem.name, "method": name, "factor": f"{factor:g}", "stage": "search", "steps": steps}
        while True:
            trials = matching(self.runs, **own)
            if not affordable([float(run["seconds"]) for run in trials], plan.budget):
                return candidate_of(best_of(trials))
            weights = METHODS[name].searches_weights
            trial = len(trials)
            tried = candidate(problem, trial, weights=weights)
            self._make(problem, name, factor, "search", FIRST_SEED + trial, tried, plan, ("validation",))

    def _make(
        self,
        problem: Problem,
        name: str,
        factor: float,
        stage: str,
        seed: int,
        chosen: Candidate,
        plan: Plan,
        parts: Sequence[Part],
    ) -> None:
        steps = plan.steps or problem.steps
        run = what(problem, name, factor, stage, seed, chosen, steps)
        if self._find(run):
            return
        outcome = train(problem, METHODS[name], chosen.lr, seed, factor, shares=chosen.shares, steps=steps, parts=parts)
        self._append(finished(run, problem, outcome))

    def _find(self, run: Run) -> bool:
        return any(key_of(other) == key_of(run) for other in self.runs)

    def _append(self, run: Run) -> None:
        append_run(self.file, run)
        self.runs.append(run)
        shown = ("problem", "method", "factor", "stage", "seed", "lr", "weights", "seconds", "validation", "test")
        print(*(run[name] for name in shown), "failed" if run["failed"] == "1" else "", flush=True)


def _in_turn(problem: Problem, methods: Sequence[str], lr: float, seed: int, steps: int) -> dict[str, float]:
    """The processor seconds of whole runs, by method."""
    torch.manual_seed(seed)
    ways: dict[str, Iterator[float]] = {
        name: step_by_step(METHODS[name], make_setup(problem, lr, seed, 1.0, None, steps)) for name in methods
    }
    seconds = dict.fromkeys(methods, 0.0)
    for _ in range(0, steps, BLOCK):
        for name, way in ways.items():
            seconds[name] += sum(islice(way, BLOCK))
    return seconds
