"""The tables: what each method reaches, what fails, what it costs, and how soon its search is good."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence

from example_projects.common.report import markdown
from example_projects.common.run_file import Run
from example_projects.evidence.methods import METHODS
from example_projects.evidence.problems.catalogue import PROBLEMS
from example_projects.evidence.record import chosen_tests, loss_of, matching
from example_projects.evidence.search import replay

SEARCHED, BASELINE = "adam_searched", "adam_sum"
SHARES_OF_BUDGET = (0.25, 0.5, 1.0)


def tables(runs: Sequence[Run]) -> str:
    """All tables, as Markdown: for each problem and factor one of results and one of the search, then those without."""
    parts = []
    for (problem, factor), own in groups(runs):
        first = own[0]
        title = problem if factor == "1" else f"{problem}, losses times up to {factor}"
        parts.append(f"## {title}\n\n{first['figure']}, {first['better']} is better\n")
        if matching(own, stage="test"):
            parts.append(markdown(results(own)) + "\n")
        if matching(own, stage="search"):
            parts.append(f"Validation {first['figure']} of the best trial so far\n\n{markdown(progress(own))}\n")
    for problem, rows in at_given_rates(runs).items():
        parts.append(f"## {problem}, at given learning rates\n\n{markdown(rows)}\n")
    times = costs(runs)
    if times:
        parts.append(f"## Processor time over that of {METHODS[BASELINE].label}\n\n{markdown(times)}\n")
    return "\n".join(parts)


def groups(runs: Sequence[Run]) -> Iterator[tuple[tuple[str, str], list[Run]]]:
    """The searches and their tests, for each problem, in the order of the problems, and each factor, 1 first."""
    searched = [run for run in runs if run["stage"] in ("search", "test")]
    found = {(run["problem"], run["factor"]) for run in searched}
    places = {problem: place for place, problem in enumerate(PROBLEMS)}
    for problem, factor in sorted(found, key=lambda one: (places.get(one[0], -1), one[1] != "1", float(one[1]))):
        yield (problem, factor), matching(searched, problem=problem, factor=factor)


def of_methods(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in the order of the methods."""
    found = {name: matching(runs, method=name) for name in METHODS}
    return {name: own for name, own in found.items() if own}


def results(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row per method: median, quartiles and worst over the seeds, the share of failed runs, and seconds.

    "beats searched": in how many seeds it is better than Adam with searched weights.

    Args:
        runs: of one problem and factor.
    """
    tests = {name: chosen_tests(own) for name, own in of_methods(runs).items()}
    rival = {run["seed"]: loss_of(run, "test") for run in tests.get(SEARCHED, [])}
    rows = []
    for name, own in tests.items():
        if not own:
            continue
        losses = {run["seed"]: loss_of(run, "test") for run in own}
        low, median, high = quartiles(list(losses.values()))
        sign = -1 if own[0]["better"] == "higher" else 1
        pairs = [(loss, rival[seed]) for seed, loss in losses.items() if seed in rival]
        trials = matching(runs, method=name, stage="search")
        rows.append(
            {
                "method": METHODS[name].label,
                "median": shown(sign * median),
                "quartiles": f"{shown(sign * low)} to {shown(sign * high)}",
                "worst": shown(sign * max(losses.values())),
                "failed": f"{sum(run['failed'] == '1' for run in own)} of {len(own)}",
                "beats searched": f"{sum(a < b for a, b in pairs)} of {len(pairs)}" if pairs else "",
                "lr": own[0]["lr"],
                "seconds a run": shown(statistics.median(float(run["seconds"]) for run in own)),
                "trials": str(len(trials)),
                "seconds of search": shown(sum(float(run["seconds"]) for run in trials)),
            }
        )
    return rows


def progress(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row per method: the best validation figure after a share of the longest search, the median of many orders.

    Args:
        runs: of one problem and factor.
    """
    searches = {name: matching(own, stage="search") for name, own in of_methods(runs).items()}
    searches = {name: own for name, own in searches.items() if own}
    longest = max(sum(float(run["seconds"]) for run in own) for own in searches.values())
    sign = -1 if runs[0]["better"] == "higher" else 1
    rows = []
    for name, own in searches.items():
        times = [share * longest for share in SHARES_OF_BUDGET]
        found = replay(trials_of(own), times)
        medians = [sign * quartiles(best)[1] for best in found]
        columns = {f"{time:.0f} s": shown(best, "none yet") for time, best in zip(times, medians, strict=True)}
        rows.append({"method": METHODS[name].label, **columns})
    return rows


def trials_of(search: Sequence[Run]) -> list[tuple[float, float]]:
    """Seconds and figure of each trial, infinite if it has failed."""
    return [(float(run["seconds"]), math.inf if run["failed"] == "1" else loss_of(run, "validation")) for run in search]


def at_given_rates(runs: Sequence[Run]) -> dict[str, list[dict[str, str]]]:
    """By problem, a row per method, factor and learning rate of the runs without a search: medians over the seeds.

    They are of all figures of the test part, those that are watched on the way among them.
    """
    kept: dict[tuple[str, str, str, str], list[Run]] = {}
    for run in matching(runs, stage="given"):
        kept.setdefault((run["problem"], run["method"], run["factor"], run["lr"]), []).append(run)
    found: dict[str, list[dict[str, str]]] = {}
    for (problem, method, factor, lr), own in kept.items():
        figures = [json.loads(run["figures"])["test"] for run in own]
        row = {
            "method": METHODS[method].label,
            "factor": factor,
            "lr": lr,
            "seeds": " ".join(run["seed"] for run in own),
            **{name: shown(statistics.median(each[name] for each in figures)) for name in figures[0]},
            "seconds a run": shown(statistics.median(float(run["seconds"]) for run in own)),
        }
        found.setdefault(problem, []).append(row)
    return found


def costs(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row per problem and method: seconds of a run over those of Adam on the sum, in the same process, in turn."""
    rows = []
    for problem in dict.fromkeys(run["problem"] for run in matching(runs, stage="cost")):
        for name, ratios in ratios_of(runs, problem).items():
            low, median, high = quartiles(ratios)
            rows.append(
                {
                    "problem": problem,
                    "method": METHODS[name].label,
                    "median": f"{median:.2f}",
                    "quartiles": f"{low:.2f} to {high:.2f}",
                    "runs": str(len(ratios)),
                }
            )
    return rows


def ratios_of(runs: Sequence[Run], problem: str) -> dict[str, list[float]]:
    """By method, the seconds over the baseline's, seed by seed; empty without the baseline."""
    own = of_methods(matching(runs, problem=problem, stage="cost"))
    usual = {run["seed"]: float(run["seconds"]) for run in own.get(BASELINE, [])}
    found = {
        name: [float(run["seconds"]) / usual[run["seed"]] for run in theirs if run["seed"] in usual]
        for name, theirs in own.items()
    }
    return {name: ratios for name, ratios in found.items() if ratios}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one; infinite values are the largest.

    Example:
        >>> quartiles([4.0, 1.0, 2.0, 3.0, float("inf")])
        (2.0, 3.0, 4.0)
    """
    ordered = sorted(values)
    return _between(ordered, 0.25), _between(ordered, 0.5), _between(ordered, 0.75)


def _between(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below, part = int(place), place - int(place)
    return ordered[below] if part == 0 else (1 - part) * ordered[below] + part * ordered[below + 1]


def shown(value: float, infinite: str = "diverged") -> str:
    """Three digits; a run that diverged has none."""
    return f"{value:.3g}" if math.isfinite(value) else infinite
