"""Normalised mean squared error: torchmetrics has its root, normalised by a mean, but not this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def normalized_squared_errors(prediction: Tensor, truth: Tensor) -> Tensor:
    """The squared error of each image, relative to the squares of its truth.

    ``||prediction - truth||^2 / ||truth||^2``, in double precision; of complex entries the squares are those of their
    magnitudes. A truth that is zero everywhere gives inf, or nan for a prediction that is so too. A common factor
    changes nothing, an offset does: give both in a range that begins at zero.

    Args:
        prediction: [B, ...], of any numbers.
        truth: of the same shape.

    Returns:
        [B], float64.

    Raises:
        ValueError: the shapes differ, there is no dimension beyond the batch, or images have no entries.

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
    if not truth.shape[1:].numel():
        raise ValueError(f"Images must have entries, but these have shape {tuple(truth.shape)}.")
    as_complex = prediction.is_complex() or truth.is_complex()
    truths, predictions = (_halves(images, as_complex=as_complex) for images in (truth, prediction))
    (error_peaks, errors), (truth_peaks, squares) = _squares(predictions - truths), _squares(truths)
    return (error_peaks / truth_peaks).square() * (errors / squares)


def _halves(images: Tensor, *, as_complex: bool) -> Tensor:
    """Half of each entry, so that no difference overflows; real and imaginary parts apart: [B, ...] -> [B, n]."""
    return (torch.view_as_real(images.to(torch.complex128)) if as_complex else images.double()).flatten(1) / 2


def _squares(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each row, and the sum of its squares relative to it, which cannot overflow: [B] each."""
    peaks = rows.detach().abs().amax(1)
    divisors = torch.where((peaks > 0) & peaks.isfinite(), peaks, 1)
    return peaks, (rows / divisors[:, None]).square().sum(1)


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
        """The mean over the images, a scalar; ``RuntimeError`` if there are none."""
        if not self.images:
            raise RuntimeError(
                "NormalizedMeanSquaredError has seen no images, so there is no mean of them. Call"
                " update(prediction, truth) with at least one before compute()."
            )
        return self.total / self.images
