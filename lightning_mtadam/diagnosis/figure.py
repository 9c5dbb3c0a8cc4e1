"""The picture of a trial, with matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lightning_mtadam.callbacks.axes import spread
from lightning_mtadam.callbacks.line_chart import color_of
from lightning_mtadam.diagnosis.advice import Course

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOSEST = 0.06
"""Labels are kept this part of the axis apart."""


def draw(course: Course) -> Figure:
    """The norms of the gradients over the steps, and the median cosine of each pair of terms.

    Raises:
        ModuleNotFoundError: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Diagnosis.plot() draws with matplotlib, which is not installed. Run pip install matplotlib, or read"
            " to_markdown()."
        ) from error
    size = len(course.terms)
    figure = Figure(figsize=(9 + 0.3 * size, 3 + 0.25 * size), layout="constrained")
    norms, cosines = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_norms(norms, course)
    _draw_cosines(cosines, course)
    return figure


def _draw_norms(axes: Axes, course: Course) -> None:
    shown = course.norms.masked_fill(course.norms == 0, torch.nan).double()
    ends = []
    for index, term in enumerate(course.terms):
        color = [part / 255 for part in color_of(index)]
        axes.plot(course.steps, shown[:, index].tolist(), color=color, marker=".")
        last = shown[:, index][shown[:, index].isfinite()]
        if len(last):
            ends.append((float(last[-1].log10()), term, color))
    axes.set(yscale="log", xlabel="step", title="Which loss pulls hardest?\nNorms of the gradients")
    axes.spines[["top", "right"]].set_visible(False)
    low, high = torch.tensor(axes.get_ylim()).log10().tolist()
    places = spread([value for value, _, _ in ends], CLOSEST * (high - low), low, high)
    for place, (_, term, color) in zip(places, ends, strict=True):
        axes.annotate(
            term,
            (1.02, (place - low) / (high - low)),
            xycoords="axes fraction",
            color=color,
            va="center",
            annotation_clip=False,
        )


def _draw_cosines(axes: Axes, course: Course) -> None:
    medians = course.cosines.nanmedian(0).values
    size = len(course.terms)
    axes.imshow(medians.tolist(), cmap="RdBu", vmin=-1, vmax=1)
    axes.set(title="Who opposes whom?\nCosines; red: opposed")
    axes.set_xticks(range(size), course.terms, rotation=45, ha="right")
    axes.set_yticks(range(size), course.terms)
    for i in range(size):
        for j in range(size):
            value = float(medians[i, j])
            if not math.isnan(value):
                axes.text(
                    j, i, f"{value:.2f}", ha="center", va="center", color="white" if abs(value) > 0.7 else "black"
                )
