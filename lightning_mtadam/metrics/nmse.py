"""Normalised mean squared error: torchmetrics has its root, normalised by a mean, but not this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def normalized_squared_errors(prediction: Tensor, truth: Tensor) -> Tensor:
    """The squared error of each image, relative to the squares of its truth.

    ``||prediction - truth||^2 / ||truth||^2``, in double precision. A truth that is zero everywhere gives inf, or nan
    for a prediction that is so too. A common factor changes nothing, an offset does: give both in a range that begins
    at zero.

    Args:
        prediction: [B, ...].
        truth: of the same shape.

    Returns:
        [B], float64.

    Raises:
        ValueError: the shapes differ, or there is no dimension beyond the batch.

    Example:
        >>> truth = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        >>> normalized_squared_errors(torch.tensor([[3.0, 3.0], [1.0, 2.0]]), truth)
        tensor([0.0400, 4.0000], dtype=torch.float64)
    """
    if prediction.shape != truth.shape or truth.dim() < 2:
        raise ValueError(
            "prediction and truth must have the same shape, (B, ...), but have shapes"
            f" {tuple(prediction.shape)} and {tuple(truth.shape)}."
        )
    truths = truth.double().flatten(1)
    errors = prediction.double().flatten(1) - truths
    return errors.square().sum(1) / truths.square().sum(1)


class NormalizedMeanSquaredError(Metric):
    """The mean over all images of ``||prediction - truth||^2 / ||truth||^2``.

    Each image counts once, whatever the batches and processes. See :func:`normalized_squared_errors`.

    Args:
        options: of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = NormalizedMeanSquaredError()
        >>> metric.update(torch.tensor([[3.0, 3.0]]), torch.tensor([[3.0, 4.0]]))
        >>> metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
        >>> metric.compute()
        tensor(2.0200, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor  # scalar, the sum over the images
    images: Tensor  # scalar, their number

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add images, both [B, ...]."""
        self.total = self.total + normalized_squared_errors(prediction, truth).sum()
        self.images = self.images + len(truth)

    def compute(self) -> Tensor:
        """The mean over the images, a scalar."""
        return self.total / self.images
