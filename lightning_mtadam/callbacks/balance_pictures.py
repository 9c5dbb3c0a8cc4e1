"""The two pictures of a balance: all terms over the steps, and layers by terms at one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_mtadam.callbacks.few_rows import few_rows
from lightning_mtadam.callbacks.heatmap import Scale, heatmap
from lightning_mtadam.callbacks.history import History
from lightning_mtadam.callbacks.line_chart import line_chart
from lightning_mtadam.callbacks.readings import Reading
from lightning_mtadam.callbacks.tags import WEIGHT

if TYPE_CHECKING:
    from PIL.Image import Image

BALANCE = Scale(
    below="multiplied up, smaller than the anchor's",
    above="divided down, larger than the anchor's",
    missing="the term does not reach the layer",
    logarithmic=True,
)
LOSSES = Scale(below="the loss is multiplied down", above="the loss is multiplied up", logarithmic=True)
MOST_LAYERS = 24


def terms_over_steps(prefix: str, history: History) -> Image:
    """The medians of all terms over the steps, or the weights of the losses, on one axis."""
    if prefix.startswith(WEIGHT):
        title = f"Balance weights{_whose(prefix)} over the steps, medians over the layers"
        legend = [f"Above 1x: {BALANCE.above}.", f"Below 1x: {BALANCE.below}."]
    else:
        title, legend = "What multiplies each loss, over the steps", []
    return line_chart(history.steps, history.series, title, legend)


def layers_by_terms(reading: Reading, when: str = "now") -> Image:
    """The balance weights of the layers that train; of many layers, the medians of their modules."""
    table, rows, joined = few_rows(reading.table, reading.layers, MOST_LAYERS)
    title = f"Balance weights{_whose(reading.prefix)} {when}: gradients over the anchor's. {joined}"
    return heatmap(table, rows, reading.terms, BALANCE, title)


def weights_by_terms(reading: Reading, when: str = "now") -> Image:
    """The weights of the losses, where layers do not differ."""
    table = torch.tensor([list(reading.term_weights.values())], device="cpu")
    return heatmap(table, ["weight"], list(reading.term_weights), LOSSES, f"What multiplies each loss {when}")


def _whose(prefix: str) -> str:
    """Of which optimizer it is, if there are several."""
    name = prefix.partition(f"{WEIGHT}-")[2]
    return f" of {name}" if name else ""
