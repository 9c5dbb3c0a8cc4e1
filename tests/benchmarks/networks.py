"""Networks of known sizes, and tasks of several losses on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from example_projects.mnist.module import CLASSES, class_losses
from example_projects.mnist.network import Net

Losses = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """Training on several losses.

    Attributes:
        network: what is trained.
        batch: input and target.
        make_losses: the terms, from output and target.
        shared: the last weight that all terms share, where GradNorm takes its norms.
    """

    network: nn.Module
    batch: Batch
    make_losses: Callable[[Tensor, Tensor], Losses]
    shared: Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.network.parameters())

    def losses(self, batch: Batch | None = None) -> Losses:
        """A forward pass, of the task's own batch or another."""
        data, target = self.batch if batch is None else batch
        return self.make_losses(self.network(data), target)


def size_of(network: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


class UNet(nn.Module):
    """A plain U-Net, without batch statistics: images [B, 3, H, W] to [B, 3, H, W].

    Args:
        width: channels of the first level; 32 makes 7.8 M parameters, 16 makes 1.9 M.
        levels: how often the image is halved, and the channels doubled.
    """

    def __init__(self, width: int = 32, levels: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(levels + 1)]
        self.down = nn.ModuleList([double_conv(a, b) for a, b in zip([3, *widths], widths, strict=False)])
        pairs = list(zip(widths[1:], widths, strict=False))[::-1]
        self.up = nn.ModuleList([nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs])
        self.merge = nn.ModuleList([double_conv(2 * b, b) for _, b in pairs])
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Translate."""
        kept = []
        for index, block in enumerate(self.down):
            images = block(images if index == 0 else F.max_pool2d(images, 2))
            kept.append(images)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            images = merge(torch.cat([kept.pop(), up(images)], 1))
        return self.last(images)


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, normalised and rectified."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def image_losses(output: Tensor, target: Tensor) -> Losses:
    """Six losses of image restoration, [B, C, H, W]: the first ones are the most common."""
    error = output - target
    return {
        "l1": error.abs().mean(),
        "edges": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
        "coarse": F.avg_pool2d(error, 4).square().mean(),
        "spectrum": torch.fft.rfft2(error).abs().mean(),
        "smooth": output.diff(dim=2).square().mean() + output.diff(dim=3).square().mean(),
        "colour": error.mean((2, 3)).square().mean(),
    }


def logit_losses(logits: Tensor, target: Tensor) -> Losses:
    """Three losses of a classifier, [B, C]."""
    log_probabilities = logits.log_softmax(1)
    return {
        "class": F.nll_loss(log_probabilities, target),
        "confidence": (log_probabilities.exp() * log_probabilities).sum(1).mean(),
        "size": logits.square().mean(),
    }


def mnist_task(batch: int = 64) -> Task:
    """The network of the PyTorch MNIST example, a loss per class."""
    network, weights = Net(), torch.ones(CLASSES)
    data = torch.randn(batch, 1, 28, 28), torch.arange(batch) % CLASSES
    return Task(network, data, lambda output, target: class_losses(output, target, weights), network.fc2.weight)


def resnet18() -> nn.Module:
    """torchvision's, for ten classes."""
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


def resnet_task(batch: int = 16, pixels: int = 64) -> Task:
    """ResNet-18 on small images, three terms."""
    network = resnet18()
    data = torch.randn(batch, 3, pixels, pixels), torch.arange(batch) % 10
    return Task(network, data, logit_losses, network.fc.weight)


def unet_task(terms: int, width: int = 32, batch: int = 4, pixels: int = 64) -> Task:
    """A U-Net on the first of ``image_losses``."""
    network = UNet(width)
    images, target = torch.randn(2, batch, 3, pixels, pixels)

    def first_losses(output: Tensor, target: Tensor) -> Losses:
        return dict(list(image_losses(output, target).items())[:terms])

    return Task(network, (images, target), first_losses, network.last.weight)


def mlp_task(terms: int, parameters: float, depth: int = 4, batch: int = 8) -> Task:
    """A multilayer perceptron whose activations are negligible; each term looks at outputs of its own."""
    width = max(terms, round(math.sqrt(parameters / depth)))
    network = nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])

    def parts(output: Tensor, target: Tensor) -> Losses:
        error = output - target
        return {f"term{index}": error[:, index::terms].square().mean() for index in range(terms)}

    return Task(network, (torch.randn(batch, width), torch.randn(batch, width)), parts, network[-2].weight)
