"""What two processes do to ``p.grad`` counts as what one does on the joined batch."""

from contextlib import nullcontext

import pytest
import torch

from lightning_mtadam import MTAdam
from tests.distributed.ranks import results, run_ranks
from tests.distributed.sharded import Network, batches, difference, losses_of, needs_fsdp2, shard, wholes
from tests.distributed.training import STEPS, Wrapped, all_equal, joined_rounds, largest, rounds
from tests.lightning_models import make_mtadam, make_network, three_losses


def forget(parameters):
    parameters[-1].grad = None


def mask(parameters):
    parameters[-2].grad[:1] = 0


def clip(parameters):
    torch.nn.utils.clip_grad_norm_(parameters, 0.05)


def noise(parameters):
    for parameter in parameters:
        parameter.grad.add_(torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view_as(parameter))


EDITS = {"forget": forget, "mask": mask, "clip": clip, "noise": noise}
OPTIONS = [{}, {"balance_every": 3}]


def train(network, model, batches, edit, accumulate, options):
    optimizer = make_mtadam(network, eps=1e-3, **options)
    parameters = list(network.parameters())
    for index, batch in enumerate(batches):
        last = (index + 1) % accumulate == 0
        with nullcontext() if last or model is network else model.no_sync():
            losses = {name: loss / accumulate for name, loss in three_losses(network, batch, model).items()}
            optimizer.backward(losses, model=model)
        if last:
            EDITS[edit](parameters)
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach() for parameter in parameters]


def train_rank(rank, accumulate):
    found = []
    for edit in EDITS:
        for options in OPTIONS:
            network = make_network()
            mine = [parts[rank] for parts in rounds(2, STEPS * accumulate, torch.float64)]
            found.append(train(network, Wrapped(network), mine, edit, accumulate, options))
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_edits_of_two_ranks_equal_those_of_one_process(accumulate, tmp_path):
    first, second = results(run_ranks(train_rank, tmp_path, accumulate))
    cases = [(edit, options) for edit in EDITS for options in OPTIONS]
    for (edit, options), one, other in zip(cases, first, second, strict=True):
        assert all_equal(one, other)
        joined = joined_rounds(2, STEPS * accumulate, torch.float64)
        network = make_network()
        expected = train(network, network, joined, edit, accumulate, options)
        assert largest(one, expected) < 1e-9, (edit, options)
        untouched = train(network := make_network(), network, joined, "forget", accumulate, options)
        assert edit == "forget" or largest(one, untouched) > 1e-4


def halve(layer):
    for parameter in layer.parameters():
        parameter.grad.mul_(0.5)


def forget_all(layer):
    for parameter in layer.parameters():
        parameter.grad = None


def clip_all(layer):
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.01)


ON_SHARDS = (halve, forget_all, clip_all)


def train_on_rows(network, rank, edit):
    optimizer = MTAdam(network.named_parameters(), lr=1e-2, eps=1e-3)
    for index, batch in enumerate(batches(rank)):
        optimizer.zero_grad()
        optimizer.backward(losses_of(network, batch), model=network)
        if index % 2:
            edit(network.last)
        optimizer.step()
    return wholes(network)


def train_shards(rank):
    return [train_on_rows(shard(Network()), rank, edit) for edit in ON_SHARDS]


@needs_fsdp2
def test_edits_of_shards_equal_those_of_whole_gradients(tmp_path):
    for found in results(run_ranks(train_shards, tmp_path)):
        for edit, one in zip(ON_SHARDS, found, strict=True):
            assert difference(one, train_on_rows(Network(), None, edit)) < 1e-9, edit.__name__
            assert difference(one, train_on_rows(Network(), None, lambda layer: None)) > 1e-4
