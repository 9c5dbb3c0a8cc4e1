"""Light steps of MTAdam(balance_every=k) over several processes; that they equal one process is in ``cases.py``."""

import torch
import torch.distributed as dist

from lightning_mtadam import NonFiniteError
from lightning_mtadam.distributed import averaging
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import Wrapped, all_equal, ddp_loop, joined_rounds, largest, rounds
from tests.lightning_models import make_mtadam, make_network, three_losses
from tests.loops import hand_loop
from tests.oracles.naive_balance_every import measured_steps

EVERY, STEPS, TERMS = 5, 20, 3


class CountingGroup:
    """Stands in for ``torch.distributed``, and counts the gradients that are sent."""

    def __init__(self):
        self.sizes = []

    def all_reduce(self, flat, **options):
        self.sizes.append(flat.numel())
        return dist.all_reduce(flat, **options)

    def get_world_size(self, group):
        return dist.get_world_size(group)


def count_sent(rank, accumulate):
    """Train, and count what is sent in every step."""
    averaging.dist = counting = CountingGroup()
    network = make_network()
    model, optimizer = Wrapped(network), make_mtadam(network, balance_every=EVERY)
    mine = [parts[rank] for parts in rounds(2, STEPS * accumulate, torch.float64)]
    sent = []
    for start in range(0, len(mine), accumulate):
        counting.sizes = []
        ddp_loop(model, optimizer, mine[start : start + accumulate], accumulate)
        sent.append(counting.sizes)
    return [parameter.detach() for parameter in network.parameters()], sent


def check(accumulate, folder):
    (first, sent), (second, _) = results(run_ranks(count_sent, folder, accumulate))
    assert all_equal(first, second)
    network = make_network()
    optimizer = make_mtadam(network, balance_every=EVERY)
    hand_loop(network, optimizer, joined_rounds(2, STEPS * accumulate, torch.float64), epochs=1, accumulate=accumulate)
    assert largest(first, [parameter.detach() for parameter in network.parameters()]) < 1e-12
    size = sum(parameter.numel() for parameter in network.parameters())
    measured = measured_steps(EVERY, STEPS)
    assert sent == [[size] * (TERMS if step in measured else 1) for step in range(STEPS)]


def test_a_light_step_sends_one_flat_gradient(tmp_path):
    check(1, tmp_path)


def test_an_accumulated_light_step_sends_one_flat_gradient_with_the_last_batch(tmp_path):
    check(3, tmp_path)


def hit_by_nan(rank):
    """In a light step the second process has a finite loss whose gradient is nan: a root of zero."""
    network = make_network()
    model, optimizer = Wrapped(network), make_mtadam(network, balance_every=EVERY)
    error = None
    for step, parts in enumerate(rounds(2, 6, torch.float64)):
        losses = three_losses(model, parts[rank])
        if step == 5:
            before = [parameter.detach().clone() for parameter in network.parameters()]
            if rank == 1:
                losses["fit"] = losses["fit"] + (0 * losses["fit"]).sqrt()
        optimizer.backward(losses, model=model)
        try:
            optimizer.step()
        except NonFiniteError as raised:
            error = str(raised)
        optimizer.zero_grad()
    return error, before, [parameter.detach() for parameter in network.parameters()]


def test_a_bad_gradient_on_one_process_changes_nothing_on_any(tmp_path):
    for error, before, after in results(run_ranks(hit_by_nan, tmp_path)):
        assert "The gradient of the term 'sum of the terms' at the layer '0.weight' is not finite" in error
        assert all_equal(before, after)
