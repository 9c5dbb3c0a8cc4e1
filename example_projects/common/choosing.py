"""Which learning rate of each method is shown: the best on the images that were held back, or on the hold-out set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from example_projects.common import report
from example_projects.common.runs import Result

# However they begin: also those of a round trip, of a side and of the luma.
HIGHER_IS_BETTER = tuple(name + kind for name in ("PSNR", "SSIM") for kind in ("", "-A", "-B", "-Y"))
HELD_BACK = "validation/"  # before the name of a metric of the images that were held back


def judged_by(result: Result, metric: str) -> float:
    """The metric by which a run is chosen: of the images that were held back, or else of the hold-out set.

    Example:
        >>> judged_by({"L1": 40.0, "validation/L1": 38.0}, "L1")
        38.0
    """
    return float(result[HELD_BACK + metric] if HELD_BACK + metric in result else result[metric])


def method_of(result: Result) -> str:
    """The method's name, of which the label of a row begins."""
    return str(result["method"]).partition(", lr ")[0]


def best_rates(results: Sequence[Result], metric: str) -> dict[str, float]:
    """The learning rate of each method whose runs have the best mean of the metric; nan is worse than everything.

    Example:
        >>> runs = [{"method": "adam, lr 0.1", "lr": 0.1, "L1": 4.0}, {"method": "adam, lr 0.2", "lr": 0.2, "L1": 3.0}]
        >>> best_rates(runs, "L1")
        {'adam': 0.2}
    """
    sign = -1 if metric.endswith(HIGHER_IS_BETTER) else 1
    found: dict[str, dict[float, list[float]]] = {}
    for result in (result for result in results if "lr" in result):
        found.setdefault(method_of(result), {}).setdefault(result["lr"], []).append(judged_by(result, metric))

    def loss(values: list[float]) -> float:
        mean = sign * statistics.fmean(values)
        return math.inf if math.isnan(mean) else mean

    return {name: min(rates, key=lambda lr, rates=rates: loss(rates[lr])) for name, rates in found.items()}


def of_these_rates(results: Sequence[Result], rates: Mapping[str, float]) -> list[Result]:
    """The results of one learning rate a method, and those that have none."""
    return [result for result in results if "lr" not in result or rates[method_of(result)] == result["lr"]]


def rates_table(results: Sequence[Result], metric: str) -> list[dict[str, str]]:
    """By which figures learning rates were chosen: a row per method, a column per rate.

    Example:
        >>> runs = [{"method": "adam, lr 0.1", "lr": 0.1, "L1": 4.0}, {"method": "adam, lr 0.2", "lr": 0.2, "L1": 3.0}]
        >>> rates_table(runs, "L1")
        [{'method': 'adam', 'lr 0.1': '4.00', 'lr 0.2': '3.00'}]
    """
    trained = [result for result in results if "lr" in result]
    names, rates = (dict.fromkeys(part(result) for result in trained) for part in (method_of, lambda run: run["lr"]))
    figures = {(method_of(result), result["lr"]): judged_by(result, metric) for result in trained}
    return [
        {"method": name, **{f"lr {lr:g}": report.mean_and_spread([figures[name, lr]]) for lr in rates}}
        for name in names
    ]
