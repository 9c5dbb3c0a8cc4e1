"""A term's gradients travel while the next term's backward pass runs."""

import time

import torch
from torch import nn

from tests.distributed.ranks import results, run_ranks
from tests.distributed.slow_link import seconds_per_step

SECONDS = 0.04
TERMS = 4


class SlowBackward(torch.autograd.Function):
    """The identity, with a backward pass that takes SECONDS without using the processor."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(SECONDS)
        return gradient


def losses(model):
    output = SlowBackward.apply(model(torch.ones(1, 20)))
    return {f"term {power}": output.pow(power).mean() for power in range(1, TERMS + 1)}


def time_steps(rank):
    network = nn.Linear(20, 50)
    size = 4 * sum(parameter.numel() for parameter in network.parameters())
    return {**seconds_per_step(network, losses, SECONDS / size, repeats=3), "size": size}


def test_a_term_travels_while_the_next_is_differentiated(tmp_path):
    for seconds in results(run_ranks(time_steps, tmp_path)):
        assert seconds["bytes"] == TERMS * seconds["size"], "I * |theta| bytes a step"
        assert seconds["transfers"] == TERMS, "one collective for each term"
        assert seconds["no overlap"] > 1.9 * TERMS * SECONDS, "transfers and backward passes, one after the other"
        assert seconds["overlap"] < 0.75 * seconds["no overlap"]
