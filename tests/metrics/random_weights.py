"""Weights of the feature networks, in the files that are expected, but random: distances with them mean nothing."""

import pytest
import torch
from torch import nn

CONVOLUTIONS = {
    **{0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)},
    **{17: (256, 512), **dict.fromkeys((19, 21, 24, 26, 28), (512, 512))},
}
"""Of torchvision's ``vgg16().features``: channels in and out, by index."""


def he(shape, generator):
    """Keeps the activations' magnitude through ReLUs."""
    return torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5


def write_inception(path):
    """Of pytorch-fid's InceptionV3."""
    from pytorch_fid import inception
    from torchvision.models import Inception3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(Inception3, "load_state_dict", lambda self, weights: None)
        network = inception.fid_inception_v3()
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = he(layer.weight.shape, generator)
    torch.save(network.state_dict(), path)
    return path


def write_vgg16(path):
    """Of torchvision's ``vgg16().features``, in half precision."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for index, (before, after) in CONVOLUTIONS.items():
        weights[f"features.{index}.weight"] = he(torch.Size([after, before, 3, 3]), generator).half()
        weights[f"features.{index}.bias"] = (0.1 * torch.randn(after, generator=generator)).half()
    torch.save(weights, path)
    return path
