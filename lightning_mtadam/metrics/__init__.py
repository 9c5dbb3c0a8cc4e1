"""Metrics of images that torchmetrics lacks. They need the extra ``metrics``, and no Lightning."""

from lightning_mtadam.metrics.extra import require

require("torchmetrics")

from lightning_mtadam.metrics.frechet import (  # noqa: E402
    FrechetDistance,
    FrechetInceptionDistance,
    FrechetVGG16Distance,
)
from lightning_mtadam.metrics.nmse import NormalizedMeanSquaredError, normalized_squared_errors  # noqa: E402

__all__ = [
    "FrechetDistance",
    "FrechetInceptionDistance",
    "FrechetVGG16Distance",
    "NormalizedMeanSquaredError",
    "normalized_squared_errors",
]
