"""A term's gradients travel while the next term's backward pass runs."""

from threading import Condition

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mtadam import MTAdam
from tests.distributed.ranks import HANGS, results, run_ranks
from tests.distributed.slow_link import SlowLink, over

TERMS = 4


class Passes:
    """Counts backward passes as they begin."""

    def __init__(self):
        self.begun, self.changed = 0, Condition()

    def begin(self, gradient):
        with self.changed:
            self.begun += 1
            self.changed.notify_all()

    def wait_for(self, count, seconds):
        with self.changed:
            return self.changed.wait_for(lambda: self.begun >= count, seconds)


class HeldLink(SlowLink):
    """A transfer that ends when the next term's backward pass has begun, or has not for so many seconds."""

    def __init__(self, passes, seconds, *, overlap):
        super().__init__(0.0, overlap=overlap)
        self.passes, self.seconds, self.met = passes, seconds, []

    def _send(self, tensor, group):
        sent = len(self.met) + 1
        self.met.append(self.passes.wait_for(min(sent + 1, TERMS), self.seconds))
        super()._send(tensor, group)


def step_over_a_link(rank, overlap, seconds):
    network = nn.Linear(20, 50)
    model, passes = DistributedDataParallel(network), Passes()
    optimizer = MTAdam(network.named_parameters())
    output = model(torch.ones(1, 20))
    output.register_hook(passes.begin)
    link = HeldLink(passes, seconds, overlap=overlap)
    with over(link):
        optimizer.backward({f"term {n}": output.pow(n).mean() for n in range(1, TERMS + 1)}, model=model)
    return link.met, link.transfers, 4 * sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("overlap", "seconds"), [(True, HANGS / 2), (False, 0.05)])
def test_a_term_travels_while_the_next_is_differentiated(overlap, seconds, tmp_path):
    """Over a link that keeps its caller, a transfer waits in vain for the next backward pass."""
    for met, transfers, size in results(run_ranks(step_over_a_link, tmp_path, overlap, seconds)):
        assert met == [overlap] * (TERMS - 1) + [True]
        assert transfers == [size] * TERMS, "one collective for each term, and I * |theta| bytes a step"
