"""What TensorBoard shows of a gradient report: matrices of terms by terms, and of layers by terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_mtadam.callbacks import tensorboard
from lightning_mtadam.gradient_statistics import GradientStatistics

MAX_ROWS = 60
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
    tensorboard.add_matrix(writer, f"gradient_cosine{suffix}/terms_by_terms", columns, terms, table, step)
    fewer, rows = joined(found, layers, MAX_ROWS)
    for name, table in (("cosine", fewer.cosines_to_update), ("share", fewer.shares)):
        tensorboard.add_matrix(writer, f"gradient_{name}{suffix}/layers_by_terms", terms, rows, table, step)


def joined(found: GradientStatistics, layers: Sequence[str], most: int) -> tuple[GradientStatistics, list[str]]:
    """Join layers until there are at most so many: those whose names begin alike, up to a dot.

    Example:
        >>> zeros = GradientStatistics(torch.zeros(3, 2, 2), torch.zeros(3, 1))
        >>> joined(zeros, ["encoder.0", "encoder.1", "head"], most=2)[1]
        ['encoder', 'head']
    """
    names, depth = list(layers), max(name.count(".") for name in layers)
    while len(set(names)) > most and depth > 0:
        names = [".".join(name.split(".")[:depth]) for name in layers]
        depth -= 1
    different = list(dict.fromkeys(names))
    layer_of = torch.tensor([different.index(name) for name in names], device="cpu")
    return found.by_layer(layer_of, len(different)), different
