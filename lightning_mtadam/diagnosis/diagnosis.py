"""The result of a trial, and how it is read: as text, as data, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_mtadam.diagnosis.advice import (
    ACTIVE,
    CHANGED,
    EVERY,
    OPPOSED,
    UNBALANCED,
    Advice,
    Course,
    Recommendation,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHAT_TO_DO: dict[Recommendation, str] = {
    "leave": "Leave the losses as they are: train on their plain sum, at one backward pass a step.",
    "reweight": "Multiply the losses by constants, and train on their sum, at one backward pass a step:\n\n"
    "    self.balancer = lightning_mtadam.balancers.FixedWeights({weights})",
    "balance": "Balance the losses while training, as constants would not stay right:\n\n"
    "    return lightning_mtadam.MTAdam(self.named_parameters(), lr=..., balance_every={every})",
    "conflict-aware": "Use an aggregator that knows of conflicts, as balance alone does not end them; e.g. TorchJD's"
    " UPGrad:\n\n    self.balancer = lightning_mtadam.balancers.TorchJDBalancer(torchjd.aggregation.UPGrad())",
}


@dataclass(frozen=True)
class Diagnosis:
    """What a trial found, and what follows from it.

    Attributes:
        course: what was measured.
        advice: what follows from it.
        costs: by way to train, the time of a step over that of a step on the sum; empty where that was not measured,
            because the module trains with MTAdam already.
        optimizer: the class that the trial trained with.

    Example:
        :func:`~lightning_mtadam.diagnose` makes one, and its example has a module to try it on::

            found = diagnose(module, data)
            found.recommendation  # "leave", "reweight", "balance" or "conflict-aware"
            found.weights  # by term, what to multiply the losses by
            print(found.to_markdown())
    """

    course: Course
    advice: Advice
    costs: dict[str, float]
    optimizer: str

    @property
    def recommendation(self) -> Recommendation:
        """One of "leave", "reweight", "balance" and "conflict-aware"."""
        return self.advice.recommendation

    @property
    def weights(self) -> dict[str, float]:
        """By term, what to multiply the losses by; 1.0 for all where they are best left as they are."""
        return dict(self.advice.weights)

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts, for JSON; ``None`` is what could not be measured."""
        course, advice = self.course, asdict(self.advice)
        advice["conflicts"] = [[*pair, cosine] for pair, cosine in self.advice.conflicts.items()]
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in advice.items()},
            "costs": dict(self.costs),
            "optimizer": self.optimizer,
            "terms": list(course.terms),
            "steps": list(course.steps),
            "losses": _numbers(course.losses),
            "norms": _numbers(course.norms),
            "cosines": _numbers(course.cosines),
        }

    def to_markdown(self) -> str:
        """The report as a page of Markdown: the advice first, then why, then what was measured."""
        advice, weights = self.advice, ", ".join(f'"{term}": {value:g}' for term, value in self.weights.items())
        todo = WHAT_TO_DO[advice.recommendation].format(weights="{" + weights + "}", every=EVERY)
        parts = [
            f"# Diagnosis: {advice.recommendation}",
            todo,
            "## Why",
            "\n".join(f"- {reason}" for reason in reasons(self)),
            "## What was measured",
            f"{len(self.course.steps)} reports in steps {self.course.steps[0]} to {self.course.steps[-1]}, trained with"
            f" {self.optimizer}. Medians over the reports; gradients are those of the losses as they were given.",
            _terms_table(self),
            "Cosines of gradients, from -1, opposed, to 1, the same direction:",
            _cosines_table(self.course),
        ]
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        return self.to_markdown()

    def plot(self) -> Figure:
        """Draw the gradients' norms over the steps, and the cosine of each pair of terms.

        Returns:
            A figure of matplotlib.

        Raises:
            ModuleNotFoundError: matplotlib is not there.
        """
        from lightning_mtadam.diagnosis.figure import draw

        return draw(self.course)


def reasons(diagnosis: Diagnosis) -> list[str]:
    """Why it is recommended, a sentence or two each, and what that would cost."""
    course, advice = diagnosis.course, diagnosis.advice
    found = [_about_ratio(course, advice)]
    if advice.ratio >= UNBALANCED:
        moved = "more than" if advice.change >= CHANGED else "less than"
        found.append(
            f"From the first third of the trial to the last their balance moved by a factor of"
            f" {_factor(advice.change)}, {moved} the {CHANGED:g} up to which constant weights are advised."
        )
    for (one, other), cosine in advice.conflicts.items():
        found.append(
            f"'{one}' and '{other}' pull against each other: the median cosine of their gradients is {cosine:.2f},"
            f" below {OPPOSED:g}. What makes one of them better makes the other worse."
        )
    if not advice.conflicts:
        found.append(f"No two terms are in conflict: no median cosine is below {OPPOSED:g}.")
    for term in advice.satisfied:
        found.append(
            f"'{term}' is soon satisfied: its gradient falls below {ACTIVE:g} of its largest, and below the others'."
            " To balance it would amplify it. If it should count for more, give it an importance."
        )
    for term in advice.dead:
        found.append(f"'{term}' never has a gradient: it trains nothing. See whether it is detached, or always zero.")
    return found + _about_costs(diagnosis)


def _about_ratio(course: Course, advice: Advice) -> str:
    verdict = "more than" if advice.ratio >= UNBALANCED else "less than"
    return (
        f"Where terms meet, the largest gradient is {_factor(advice.ratio)} times the smallest, {verdict} the factor of"
        f" {UNBALANCED:g} from which on balance is advised."
    )


def _factor(value: float) -> str:
    """With two digits, and commas where it is large."""
    return f"{float(f'{value:.2g}'):,g}" if value < 1e6 else f"{value:.1e}"


def _about_costs(diagnosis: Diagnosis) -> list[str]:
    if not diagnosis.costs:
        return ["What a step would cost was not measured: the trial balanced already."]
    costs = ", ".join(f"{way} {cost:.2f}" for way, cost in diagnosis.costs.items())
    return [
        f"A step takes, over one on the plain sum: {costs}. It is an estimate from the time of the backward passes."
    ]


def _terms_table(diagnosis: Diagnosis) -> str:
    course, weights = diagnosis.course, diagnosis.weights
    rows = [["term", "loss at first", "loss at last", "norm of gradient", "weight"]]
    norms = course.norms.median(0).values.tolist()
    for index, term in enumerate(course.terms):
        losses = course.losses[:, index]
        seen: list[float] = losses[losses.isfinite()].tolist() or [float("nan")]
        rows.append([term, *(f"{value:.3g}" for value in (seen[0], seen[-1], norms[index], weights[term]))])
    return _table(rows)


def _cosines_table(course: Course) -> str:
    medians = course.cosines.nanmedian(0).values.tolist()
    rows = [["", *course.terms]]
    for term, row in zip(course.terms, medians, strict=True):
        rows.append([term, *("" if math.isnan(value) else f"{value:.2f}" for value in row)])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, of a head and rows, in columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _numbers(table: Tensor) -> Any:
    """A tensor as lists, with ``None`` for what is not finite."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return value if math.isfinite(value) else None

    return plain(table.tolist())
