"""The table: every setting at its own best learning rate, beside the best Adam."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from example_projects.common.run_file import Run

Group = dict[float, dict[int, float]]  # of one setting: by learning rate and seed, the metric


def table(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One row per problem, decay and setting, the best first.

    The best learning rate is that of the smallest geometric mean over the seeds. The oracle is the best of Adam with
    weights that were chosen. A ratio is taken seed by seed; of the ratios the geometric mean is given, and the range.
    """
    groups: dict[tuple[str, str], dict[str, Group]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for run in runs:
        group = groups[run["problem"], run["decay"]][run["setting"]]
        group[float(run["lr"])][int(run["seed"])] = metric_of(run)
    return [row for key, settings in groups.items() for row in rows_of(*key, settings)]


def metric_of(run: Run) -> float:
    """The figure that counts; infinite if the run diverged."""
    value = float(json.loads(run["figures"])[run["metric"]])
    return value if math.isfinite(value) else math.inf


def rows_of(problem: str, decay: str, settings: Mapping[str, Group]) -> list[dict[str, str]]:
    """The rows of one problem."""
    best = {name: best_lr(group) for name, group in settings.items()}
    order = sorted(settings, key=lambda name: geometric_mean(settings[name][best[name]].values()))
    oracles = [name for name in order if name.startswith("adam") and "weights=given" not in name]
    oracle = settings[oracles[0]][best[oracles[0]]] if oracles else {}
    rows = []
    for name in order:
        values = settings[name][best[name]]
        ratios = [value / oracle[seed] for seed, value in values.items() if seed in oracle]
        rows.append(
            {
                "problem": problem,
                "decay": decay,
                "setting": name,
                "best_lr": f"{best[name]:g}{at_the_edge(settings[name], best[name])}",
                "n": str(len(values)),
                "metric": mean_and_range(list(values.values())),
                "against_oracle": mean_and_range(ratios),
            }
        )
    return rows


def best_lr(group: Group) -> float:
    """The learning rate of the smallest geometric mean, of those with the most seeds."""
    most = max(len(values) for values in group.values())
    whole = {lr: geometric_mean(values.values()) for lr, values in group.items() if len(values) == most}
    return min(whole, key=whole.__getitem__)


def at_the_edge(group: Group, lr: float) -> str:
    """A mark if the best learning rate is the smallest or the largest that was tried."""
    return " (smallest)" if lr == min(group) else " (largest)" if lr == max(group) else ""


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean, infinite if a value is."""
    values = list(values)
    return math.inf if math.inf in values else statistics.geometric_mean(values)


def mean_and_range(values: Sequence[float]) -> str:
    """The geometric mean, and the range.

    Example:
        >>> mean_and_range([1.0, 4.0])
        '2 (1 to 4)'
    """
    if not values:
        return ""
    return f"{geometric_mean(values):.3g} ({min(values):.3g} to {max(values):.3g})"
