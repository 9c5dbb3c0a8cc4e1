"""The networks whose features are compared, where no checkpoint, optimizer, precision or train() reaches them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_mtadam.metrics.extra import require
from lightning_mtadam.metrics.weights import inception_file, read_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureNetwork(nn.Module, ABC):
    """A frozen network, hidden from every module that holds it.

    It has no parameters and no state as far as others can see, stays in evaluation mode and in its own precision, also
    under autocast, and follows to other devices.

    Args:
        network: evaluated as it is.
    """

    num_features: int

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._hidden = (network.eval().requires_grad_(False),)  # what is in a tuple is not registered

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return self._hidden[0]

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1], float32 -> [B, num_features]."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, num_features], float64."""
        with torch.autocast(images.device.type, enabled=False):
            return self.extract(images.float()).double()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureNetwork:
        """Follow to another device, but not to another precision."""
        here = next(self.network.parameters()).device
        self.network.to(fn(torch.empty(0, device=here)).device)
        return self


class InceptionFeatures(FeatureNetwork):
    """pytorch-fid's InceptionV3 up to its last pooling: the features of FID.

    Args:
        weights_path: the file of its weights. By default that in the environment variable
            ``LIGHTNING_MTADAM_INCEPTION_WEIGHTS``, or pytorch-fid's own, downloaded if it is missing.

    Raises:
        FileNotFoundError: there is no such file, or it could not be downloaded.
        ValueError: it holds other weights.
        ModuleNotFoundError: pytorch-fid is not installed.
    """

    num_features = 2048

    def __init__(self, weights_path: str | Path | None = None) -> None:
        super().__init__(_inception(inception_file(weights_path)))

    def extract(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 2048]. The network itself resizes to 299 x 299."""
        features: Tensor = self.network(images)[0]
        return features.flatten(1)


class VGG16Features(FeatureNetwork):
    """torchvision's VGG16 up to its last convolution and ReLU, averaged over all places, at the images' own size.

    Args:
        weights_path: the file of the weights of ``vgg16()`` or of its ``features``, in any precision.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds other weights.
    """

    num_features = 512
    smallest = 16  # pixels: halved four times

    def __init__(self, weights_path: str | Path) -> None:
        super().__init__(_vgg16(weights_path))

    def extract(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 512]."""
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"VGG16 takes images of at least {self.smallest} x {self.smallest} pixels, but got shape"
                f" {tuple(images.shape)}. Use larger ones."
            )
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        features: Tensor = self.network((images - mean) / std)
        return features.mean((2, 3))


def _inception(path: Path) -> nn.Module:
    weights = read_weights(path)
    inception = require("pytorch_fid.inception")
    load = inception.load_state_dict_from_url
    # Its constructor takes the weights from this function only.
    inception.load_state_dict_from_url = lambda *args, **options: weights
    try:
        network: nn.Module = inception.InceptionV3()
    except RuntimeError as error:
        raise _other_weights(path, "pytorch-fid's InceptionV3", error) from error
    finally:
        inception.load_state_dict_from_url = load
    return network


def _vgg16(path: str | Path) -> nn.Module:
    weights = {
        name.removeprefix("features."): value.float()
        for name, value in read_weights(path).items()
        if not name.startswith("classifier.")
    }
    with torch.device("meta"):  # the unused classifier would take 480 MB
        network: nn.Module = require("torchvision").models.vgg16().features[:-1]
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise _other_weights(Path(path), "torchvision's VGG16", error) from error
    return network


def _other_weights(path: Path, network: str, error: RuntimeError) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"{path} does not hold the weights of {network}: {reason[:300]} Give the file made for it.")
