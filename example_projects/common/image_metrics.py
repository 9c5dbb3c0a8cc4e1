"""How near images are to the truth: the metrics of the paper, over all processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from lightning_mtadam.metrics import (
    FrechetDistance,
    FrechetInceptionDistance,
    FrechetVGG16Distance,
    normalized_squared_errors,
)

PEAK = 255.0
FEATURE_EXTRACTORS = ("inception", "vgg16", "none")
DISTANCES = {"inception": FrechetInceptionDistance.label, "vgg16": FrechetVGG16Distance.label}
# What the distances' messages call by a name of their own, and a command by its options, the longer name first.
OPTIONS = {
    "weights_path=...": "--weights",
    "weights_path": "--weights",
    "FrechetVGG16Distance": "--feature-extractor vgg16",
}
# Luma of ITU-R BT.601 in 16..235, of red, green and blue in 0..255: that of MATLAB's rgb2ycbcr.
LUMA, LUMA_OFFSET = (65.481 / 255, 128.553 / 255, 24.966 / 255), 16.0


class ImageMetrics:
    """The mean over all images of L1, L2, NMSE, PSNR and SSIM, and the Frechet distance of their features.

    What is compared is what a PNG file would hold: images are brought to 0..255 and rounded first. L1 is the mean
    absolute error, in 0..255, L2 the mean squared error, in squares of these. An image with a value that is not finite
    makes the means nan or inf.

    This is no module: what holds it neither saves nor trains the network of the distance.

    Args:
        distance: from :func:`make_distance`; reported by its label ("FID", "FD-VGG16"), with the number of images "n".
        y_border: also report "PSNR-Y" and "SSIM-Y", without a border of as many pixels.

    Example:
        >>> metrics = ImageMetrics()
        >>> truth = torch.zeros(2, 3, 8, 8)
        >>> metrics.update(truth + 0.2, truth)
        >>> {name: round(value, 2) for name, value in metrics.compute().items()}
        {'L1': 25.0, 'L2': 625.0, 'NMSE': 0.04, 'PSNR': 20.17, 'SSIM': 0.98}
    """

    def __init__(self, distance: FrechetDistance | None = None, *, y_border: int | None = None) -> None:
        self.distance = distance
        self._means = _PixelMeans(y_border)

    @property
    def names(self) -> list[str]:
        """What ``compute`` gives."""
        return [*self._means.names, *([self.distance.label, "n"] if self.distance is not None else [])]

    def to(self, device: torch.device | str) -> ImageMetrics:
        """Move to the device on which the images are."""
        self._means.to(device)
        if self.distance is not None:
            self.distance.to(device)
        return self

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Compare images, both [B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: other shapes.
        """
        prediction, truth = _levels(prediction), _levels(truth)
        _check_shapes(prediction, truth)
        self._means.update(prediction, truth)
        if self.distance is not None:
            self.distance.update(prediction / PEAK, real=False)
            self.distance.update(truth / PEAK, real=True)

    def compute(self) -> dict[str, float]:
        """The metrics by name, of all images on all processes since ``reset``."""
        values = {name: value.item() for name, value in self._means.compute().items()}
        if self.distance is not None:
            values[self.distance.label] = self.distance.compute().item()
            values["n"] = self.distance.n
        return values

    def reset(self) -> None:
        """Forget all images."""
        self._means.reset()
        if self.distance is not None:
            self.distance.reset()


def make_distance(feature_extractor: str, weights: Path | None) -> FrechetDistance | None:
    """The Frechet distance to report: FID, FD-VGG16, or none.

    Args:
        feature_extractor: "inception", "vgg16" or "none".
        weights: the file of the network's weights; for "inception" it may be left out, see
            :class:`lightning_mtadam.metrics.FrechetInceptionDistance`.

    Raises:
        FileNotFoundError: the weights are not there, and could not be downloaded.
        ValueError: the file holds other weights, or is missing, or given where none is needed.
    """
    if feature_extractor not in FEATURE_EXTRACTORS:
        raise ValueError(f"--feature-extractor must be one of {FEATURE_EXTRACTORS}, but is {feature_extractor!r}.")
    try:
        return _distance(feature_extractor, weights)
    except (FileNotFoundError, ValueError) as error:
        said = str(error)
        for word, option in OPTIONS.items():
            said = said.replace(word, option)
        raise (FileNotFoundError if isinstance(error, OSError) else ValueError)(said) from error


def _distance(feature_extractor: str, weights: Path | None) -> FrechetDistance | None:
    if feature_extractor == "inception":
        return FrechetInceptionDistance(weights)
    if feature_extractor == "none":
        if weights is not None:
            raise ValueError("--weights is given, but --feature-extractor is none. Leave one of the two out.")
        return None
    if weights is None:
        raise ValueError(
            "--feature-extractor vgg16 needs --weights, the file of the weights of torchvision's vgg16() or of its"
            " features."
        )
    return FrechetVGG16Distance(weights)


def y_channel_metrics(prediction: Tensor, truth: Tensor, border: int = 4) -> dict[str, float]:
    """PSNR and SSIM of the luma, as super-resolution is measured: the means over a batch.

    Args:
        prediction: [B, 3, H, W] in [-1, 1].
        truth: of the same shape.
        border: pixels at every edge that are left out.

    Returns:
        "PSNR-Y" and "SSIM-Y".

    Raises:
        ValueError: other shapes, or an image that is hardly larger than its borders.

    Example:
        >>> truth = torch.zeros(1, 3, 24, 24)
        >>> {name: round(value, 3) for name, value in y_channel_metrics(truth + 0.2, truth).items()}
        {'PSNR-Y': 21.494, 'SSIM-Y': 0.988}
    """
    prediction, truth = _levels(prediction), _levels(truth)
    _check_shapes(prediction, truth)
    return {name: values.mean().item() for name, values in _y_values(prediction, truth, border).items()}


class _PixelMeans(Metric):
    """The means over all images of what each pair of images gives by itself."""

    full_state_update = False

    totals: Tensor  # [K], the sums over the images
    images: Tensor  # scalar, their number

    def __init__(self, y_border: int | None) -> None:
        super().__init__()
        self.y_border = y_border
        self.names = ["L1", "L2", "NMSE", "PSNR", "SSIM", *(["PSNR-Y", "SSIM-Y"] if y_border is not None else [])]
        self.add_state("totals", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add images, both [B, 3, H, W] in 0..255."""
        values = _pixel_values(prediction, truth)
        if self.y_border is not None:
            values |= _y_values(prediction, truth, self.y_border)
        self.totals = self.totals + torch.stack([values[name].double().sum() for name in self.names])
        self.images = self.images + len(truth)

    def compute(self) -> dict[str, Tensor]:
        """The means by name, scalars."""
        return dict(zip(self.names, self.totals / self.images, strict=True))


def _levels(images: Tensor) -> Tensor:
    """[-1, 1] to the whole numbers 0..255 that a file would hold, as float; nan stays nan."""
    return images.detach().float().add(1).mul(PEAK / 2).round().clamp(0, PEAK)


def _pixel_values(prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Both [B, 3, H, W] in 0..255 -> by name, [B]."""
    errors = (prediction - truth).flatten(1)
    return {
        "L1": errors.abs().mean(1),
        "L2": errors.square().mean(1),
        "NMSE": normalized_squared_errors(prediction, truth),
        "PSNR": _psnr(prediction, truth),
        "SSIM": _ssim(prediction, truth),
    }


def _y_values(prediction: Tensor, truth: Tensor, border: int) -> dict[str, Tensor]:
    """Both [B, 3, H, W] in 0..255 -> by name, [B]."""
    prediction, truth = _luma(prediction, border), _luma(truth, border)
    return {"PSNR-Y": _psnr(prediction, truth), "SSIM-Y": _ssim(prediction, truth)}


def _luma(images: Tensor, border: int) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H - 2 border, W - 2 border], both in 0..255."""
    height, width = images.shape[-2:]
    if min(height, width) <= 2 * border:
        raise ValueError(
            f"An image of {height} x {width} pixels is nothing but its borders of {border} pixels. Use larger images,"
            " or a smaller border."
        )
    luma = torch.tensordot(images, images.new_tensor(LUMA), dims=([1], [0])).add(LUMA_OFFSET).unsqueeze(1)
    return luma[..., border : height - border, border : width - border]


def _psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    return peak_signal_noise_ratio(prediction, truth, data_range=PEAK, reduction="none", dim=(1, 2, 3))


def _ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    # Whether the mean leaves out the edges depends on torchmetrics' version: take it here, over all pixels.
    _, similarity = structural_similarity_index_measure(prediction, truth, data_range=PEAK, return_full_image=True)
    return similarity.flatten(1).mean(1)


def _check_shapes(prediction: Tensor, truth: Tensor) -> None:
    if prediction.shape != truth.shape or truth.dim() != 4 or truth.shape[1] != 3:
        raise ValueError(
            "prediction and truth must have the same shape, (B, 3, H, W), but have shapes"
            f" {tuple(prediction.shape)} and {tuple(truth.shape)}."
        )
