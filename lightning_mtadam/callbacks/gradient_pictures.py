"""What TensorBoard shows of a gradient report: matrices of terms by terms, and of layers by terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_mtadam.callbacks import tensorboard
from lightning_mtadam.callbacks.few_rows import modules_of
from lightning_mtadam.callbacks.heatmap import Scale, heatmap
from lightning_mtadam.gradient_statistics import GradientStatistics

COSINES = Scale("against each other", "with each other", "no gradient", limit=1.0)
SHARES = Scale("against the update", "makes it", "no gradient", limit=1.0)
MAX_ROWS = 24
"""With more layers than this a picture has a row for what they are parts of."""


def add_pictures(
    writer: Any, suffix: str, terms: Sequence[str], layers: Sequence[str], found: GradientStatistics, step: int
) -> None:
    """Write the cosines of each two terms, of the network; and by layer those to the update, and the shares in it.

    Args:
        writer: TensorBoard's.
        suffix: of the tags' first part.
        terms: the names of I terms.
        layers: the names of L layers.
        found: of these layers.
        step: where they are filed.
    """
    whole, columns = found.whole, [*terms, "update"]
    table = torch.cat([whole.cosines, whole.cosines_to_update[:, None]], 1)
    fewer, rows = joined(found, layers, MAX_ROWS)
    pictures = {
        f"gradient_cosine{suffix}/terms_by_terms": heatmap(
            table, terms, columns, COSINES, f"Cosines of the terms' gradients at step {step:,}"
        ),
        f"gradient_cosine{suffix}/layers_by_terms": heatmap(
            fewer.cosines_to_update, rows, terms, COSINES, f"Cosines of the terms to the update at step {step:,}"
        ),
        f"gradient_share{suffix}/layers_by_terms": heatmap(
            fewer.shares, rows, terms, SHARES, f"Shares of the terms in the update at step {step:,}"
        ),
    }
    for tag, picture in pictures.items():
        tensorboard.add_picture(writer, tag, picture, step)


def joined(found: GradientStatistics, layers: Sequence[str], most: int) -> tuple[GradientStatistics, list[str]]:
    """Join layers until there are at most so many: those whose names begin alike, up to a dot.

    Example:
        >>> zeros = GradientStatistics(torch.zeros(3, 2, 2), torch.zeros(3, 1))
        >>> joined(zeros, ["encoder.0", "encoder.1", "head"], most=2)[1]
        ['encoder', 'head']
    """
    names = modules_of(layers, most)
    different = list(dict.fromkeys(names))
    layer_of = torch.tensor([different.index(name) for name in names], device="cpu")
    return found.by_layer(layer_of, len(different)), different
