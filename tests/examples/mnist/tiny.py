"""MNIST's command, on little data and a network that is quick to train."""

from functools import partial

from torch import nn

from example_projects.mnist import __main__ as command
from example_projects.mnist.module import CLASSES
from tests.examples.running import output_of

call = partial(output_of, command.main)

BATCH, EPOCH = 16, 4  # samples a batch, batches an epoch


class Small(nn.Module):
    """Stands in for the network where only the run matters; random numbers are used as there."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Dropout(dropout), nn.Linear(8, CLASSES))

    def forward(self, images):
        return self.layers(images).log_softmax(1)
