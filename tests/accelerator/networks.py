"""ResNet-18 in plain torch: a machine with a GPU may have nothing but torch and Lightning."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*(shortcut if stride > 1 else []))

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = (self.second(self.first(inputs).relu()) + self.shortcut(inputs)).relu()
        return found


def resnet18(classes: int = 10) -> nn.Sequential:
    """He et al. 2015: 62 tensors, 11.2 M elements with ten classes."""
    widths = (64, 64, 128, 256, 512)
    blocks = [
        _Block(before if index == 0 else width, width, 2 if index == 0 and width > 64 else 1)
        for before, width in pairwise(widths)
        for index in range(2)
    ]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def gpt2_shapes(share: int = 1) -> list[tuple[int, ...]]:
    """The shapes of GPT-2's 148 tensors, 124M elements; a ``share`` of 16 or 4 leaves a 16th or a quarter of them."""
    width = 768 // round(share**0.5)
    block = [
        *((width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)),
        *((width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)),
    ]
    tokens = 50257 // round(share**0.5)
    return [(tokens, width), (1024, width), *block * 12, (width,), (width,)]
