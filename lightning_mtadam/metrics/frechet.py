"""Frechet distances between sets of images: FID, and one that may not be called so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance as TorchMetricsDistance

from lightning_mtadam.metrics.features import FeatureNetwork, InceptionFeatures, VGG16Features
from lightning_mtadam.metrics.gaussians import fit, frechet_distance


class FrechetDistance(TorchMetricsDistance):
    """The Frechet distance between the Gaussians that fit the features of two sets of images.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` with means m and covariances S. Images are rounded to the 256
    levels of an image file first, so that the distance is that of the images when saved as PNG files.

    torchmetrics adds the features up, in double precision and over all processes. The distance is computed otherwise,
    as with fewer images than features the root of the product, there and in pytorch-fid, adds up the rounding of its
    zero eigenvalues: about 5e-6 of a distance of 3.

    The distance is biased: it grows as the number of images falls. Compare distances of the same number only; ``n`` is
    the smaller number of the two sets, over all processes, as of the last :meth:`compute`.

    Args:
        features: makes [B, ``num_features``] of images, float [B, 3, H, W] in [0, 1].
        options: of torchmetrics' FrechetInceptionDistance, e.g. ``reset_real_features=False``.

    Attributes:
        label: what the distance is called wherever it is reported.

    Example:
        >>> class Colors(FeatureNetwork):
        ...     num_features = 3
        ...     def extract(self, images):
        ...         return images.mean((2, 3))
        >>> distance = FrechetDistance(Colors(nn.Identity()))
        >>> images = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> distance.update(images, real=True)
        >>> distance.update(images / 2, real=False)
        >>> round(float(distance.compute()), 2), distance.n
        (0.19, 8)
    """

    label = "FD"
    n = 0

    def __init__(self, features: FeatureNetwork, **options: Any) -> None:
        super().__init__(feature=features, **options)

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images.

        Args:
            imgs: [B, 3, H, W], uint8, or floating-point in [0, 1].
            real: whether they belong to the set that is taken as true.

        Raises:
            TypeError: another dtype.
            ValueError: another shape or range.
        """
        super().update(as_in_a_file(imgs), real=real)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; nan if a feature was not finite.

        Raises:
            RuntimeError: a set has fewer than two images.
        """
        real, made = int(self.real_features_num_samples), int(self.fake_features_num_samples)
        if min(real, made) < 2:
            raise RuntimeError(
                f"A Frechet distance needs at least two images of each set, but got {real} real ones and {made} others."
                " Update with more images before compute()."
            )
        self.n = min(real, made)
        return frechet_distance(
            fit(self.real_features_sum, self.real_features_cov_sum, real),
            fit(self.fake_features_sum, self.fake_features_cov_sum, made),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Follow to another device, but not to another precision."""
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)


class FrechetInceptionDistance(FrechetDistance):
    """FID as pytorch-fid computes it, on its InceptionV3, from tensors while training.

    Equal to ``python -m pytorch_fid`` on the same images saved as PNG files. The network is no part of the parameters
    and the state of a module that holds the metric. See :class:`FrechetDistance` for ``n`` and rounding.

    Args:
        weights_path: the file of the network's weights. By default that in the environment variable
            ``LIGHTNING_MTADAM_INCEPTION_WEIGHTS``, or pytorch-fid's own in torch.hub's cache, downloaded if missing.
        options: of torchmetrics' FrechetInceptionDistance.

    Raises:
        FileNotFoundError: the weights are not there and could not be downloaded.
        ValueError: the file holds other weights.
        ModuleNotFoundError: pytorch-fid is not installed.

    Example:
        >>> fid = FrechetInceptionDistance()
        >>> photos = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
        >>> fid.update(photos, real=True)
        >>> fid.update(torch.rand(5, 3, 64, 64), real=False)
        >>> f"{fid.label} = {fid.compute():.2f}, n = {fid.n}"  # doctest: +ELLIPSIS
        'FID = ..., n = 4'

    References:
        Heusel et al., *GANs Trained by a Two Time-Scale Update Rule*, NeurIPS 2017; Seitzer, *pytorch-fid*.
    """

    label = "FID"

    def __init__(self, weights_path: str | Path | None = None, **options: Any) -> None:
        super().__init__(InceptionFeatures(weights_path), **options)


class FrechetVGG16Distance(FrechetDistance):
    """The Frechet distance of VGG16's features. **It is not FID**: its values mean something else.

    For where Inception's weights cannot be had. The features are those of the last convolution, averaged over the
    image; images are not resized, so compare distances of the same size of images only.

    Args:
        weights_path: the file of the weights of torchvision's ``vgg16()`` or of its ``features``.
        options: of torchmetrics' FrechetInceptionDistance.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds other weights.

    Example:
        >>> distance = FrechetVGG16Distance("vgg16.pth")
        >>> distance.update(torch.rand(4, 3, 32, 32), real=True)
        >>> distance.update(torch.rand(5, 3, 32, 32), real=False)
        >>> f"{distance.label} = {distance.compute():.2f}, n = {distance.n}"  # doctest: +ELLIPSIS
        'FD-VGG16 = ..., n = 4'
    """

    label = "FD-VGG16"

    def __init__(self, weights_path: str | Path, **options: Any) -> None:
        super().__init__(VGG16Features(weights_path), **options)


def as_in_a_file(images: Tensor) -> Tensor:
    """What is left of images [B, 3, H, W] in a file of 256 levels, as float32 in [0, 1]; nan stays nan.

    Example:
        >>> as_in_a_file(torch.tensor([0.0, 0.1, 0.5, 1.0]).view(4, 1, 1, 1).expand(4, 3, 1, 1))[:, 0, 0, 0] * 255
        tensor([  0.,  26., 128., 255.])
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"Images must have the shape (B, 3, H, W), but have {tuple(images.shape)}. Of grey ones, .expand(-1, 3,"
            " -1, -1) makes colours."
        )
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise TypeError(f"Images must be uint8, or floating-point in [0, 1], but have dtype {images.dtype}.")
    if (images < 0).any() or (images > 1).any():
        raise ValueError(
            f"Floating-point images must be in [0, 1], but go from {images.min():.3g} to {images.max():.3g}. Scale"
            " them, e.g. from [-1, 1] with (images + 1) / 2, and .clamp(0, 1) what is beyond."
        )
    return images.float().mul(255).add(0.5).floor().div(255)
