"""Little data, and a network that is quick to train."""

import pytest
import torch

from example_projects.mnist import module as mnist_module
from example_projects.mnist.data import FILES
from example_projects.mnist.make_subset import write_idx
from example_projects.mnist.module import CLASSES
from tests.examples.mnist.tiny import BATCH, EPOCH, Small


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """64 training and 20 test images of noise, every class among them, as MNIST's four idx files."""
    folder = tmp_path_factory.mktemp("tiny")
    generator = torch.Generator().manual_seed(0)
    for split, size in (("train", BATCH * EPOCH), ("test", 20)):
        images, labels = FILES[split]
        pixels = torch.randint(256, (size, 28, 28), dtype=torch.uint8, generator=generator)
        write_idx(folder / f"{images}.gz", pixels)
        write_idx(folder / f"{labels}.gz", torch.arange(size, dtype=torch.uint8) % CLASSES)
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(mnist_module, "Net", Small)
