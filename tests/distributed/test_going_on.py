"""Ranks exchange words once a step; after an error that a loop catches, all of them go on, or none does."""

import time
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mtadam import MTAdam
from lightning_mtadam.balancers import GradNorm, MetaBalance
from lightning_mtadam.distributed import agreement, averaging
from lightning_mtadam.distributed.agreement import RankError
from tests.distributed.ranks import PATIENCE, TWO_OR_THREE, results, run_ranks
from tests.distributed.training import rounds
from tests.lightning_models import make_network, three_losses

STEPS = 9


def batches_of(rank, ranks=2):
    return [batches[rank] for batches in rounds(ranks, STEPS, torch.float64)]


# One exchange


def exchanges(rank, options):
    """How often words were exchanged in each step."""
    counted, real = [], agreement._exchange
    network = make_network()
    model = DistributedDataParallel(network)
    optimizer = MTAdam(network.named_parameters(), lr=1e-2, **options)
    for batch in batches_of(rank):
        calls = []
        agreement._exchange = lambda *arguments, of=calls: of.append(1) or real(*arguments)
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch, model), model=model)
        optimizer.step()
        counted.append(len(calls))
    return counted


@pytest.mark.parametrize("options", [{}, {"balance_every": 3}, {"denominator": "own"}], ids=str)
def test_words_are_exchanged_once_a_step_after_the_first(options, tmp_path):
    for counted in results(run_ranks(exchanges, tmp_path, options)):
        assert counted == [2] + [1] * (STEPS - 1)


# Errors that are caught


def no_scalar(losses, network):
    return {**losses, "size": losses["size"].expand(2)}


def fails_in_backward(losses, network, of="size"):
    def fail(gradient):
        raise OSError("the disk is full")

    losses[of].register_hook(fail)
    return losses


def lacks_a_term(losses, network):
    return {name: loss for name, loss in losses.items() if name != "fit"}


def frozen(losses, network):
    network[2].bias.requires_grad_(False)
    return losses


SPOILING = {
    "a loss that is no scalar": no_scalar,
    "an error in the first backward pass": partial(fails_in_backward, of="fit"),
    "an error in the second backward pass": fails_in_backward,
    "an error in the last backward pass": partial(fails_in_backward, of="decay"),
    "a term that is missing": lacks_a_term,
    "a parameter that is frozen": frozen,
}


def catching(rank, ranks, spoil, at, options):
    """Trains on; what fails is caught, and its step left out. The last rank spoils one step."""
    network = make_network()
    model = DistributedDataParallel(network)
    optimizer = MTAdam(network.named_parameters(), lr=1e-2, **options)
    caught = []
    for step, batch in enumerate(batches_of(rank, ranks)):
        optimizer.zero_grad()
        losses = three_losses(network, batch, model)
        if step == at and rank == ranks - 1:
            losses = spoil(losses, network)
        try:
            optimizer.backward(losses, model=model)
        except (ValueError, OSError, RankError) as error:
            caught.append(f"{step}: {type(error).__name__}")
            network.requires_grad_(True)
            continue
        optimizer.step()
    return caught, [parameter.detach() for parameter in network.parameters()]


def leaving_out(rank, ranks, at, options):
    """The same without the step that is spoilt."""
    network = make_network()
    model = DistributedDataParallel(network)
    optimizer = MTAdam(network.named_parameters(), lr=1e-2, **options)
    for step, batch in enumerate(batches_of(rank, ranks)):
        if step != at:
            optimizer.zero_grad()
            optimizer.backward(three_losses(network, batch, model), model=model)
            optimizer.step()
    return [parameter.detach() for parameter in network.parameters()]


@TWO_OR_THREE
@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("name", SPOILING)
def test_all_ranks_go_on_after_an_error_that_is_caught(name, at, ranks, tmp_path):
    outcomes = run_ranks(catching, tmp_path, ranks, SPOILING[name], at, {}, ranks=ranks)
    found = results(outcomes)
    assert all(outcome.seconds < PATIENCE for outcome in outcomes)
    (tmp_path / "without").mkdir()
    expected = results(run_ranks(leaving_out, tmp_path / "without", ranks, at, {}, ranks=ranks))
    for (caught, parameters), wanted in zip(found, expected, strict=True):
        assert len(caught) == 1
        assert caught[0].startswith(f"{at}: ")
        for mine, theirs in zip(parameters, wanted, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("options", [{"balance_every": 3}, {"low_memory": True}], ids=str)
def test_all_ranks_are_alike_after_it_with_other_options(options, tmp_path):
    found = results(run_ranks(catching, tmp_path, 2, fails_in_backward, 4, options))
    (caught, first), (other, second) = found
    assert len(caught) == len(other) == 1
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)


def too_late(rank, gone):
    """A rank fails, and does not wait until the other hears of it. It leaves a file when it has gone on."""
    agreement.PATIENCE = 0.2
    network = make_network()
    model = DistributedDataParallel(network)
    optimizer = MTAdam(network.named_parameters(), lr=1e-2)
    caught = []
    for step, batch in enumerate(batches_of(rank)[:5]):
        optimizer.zero_grad()
        losses = three_losses(network, batch, model)
        if step == 2:
            losses = no_scalar(losses, network) if rank else slow(losses, gone)
        try:
            optimizer.backward(losses, model=model)
        except (ValueError, RankError) as error:
            caught.append(f"{step}: {type(error).__name__}")
            gone.touch()
            continue
        optimizer.step()
    return caught


def slow(losses, gone):
    def wait(gradient):
        while not gone.exists():
            time.sleep(0.01)

    losses["fit"].register_hook(wait)
    return losses


def test_it_is_refused_on_all_ranks_where_they_missed_each_other(tmp_path):
    outcomes = run_ranks(too_late, tmp_path, tmp_path / "gone")
    first, second = results(outcomes)
    assert first == ["2: RankError", "3: RankError", "4: RankError"]
    assert second == ["2: ValueError", "3: RankError", "4: RankError"]


# Options


def with_options(rank, options):
    network = make_network()
    model = DistributedDataParallel(network)
    optimizer = MTAdam(network.named_parameters(), **options(rank))
    for batch in batches_of(rank):
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch, model), model=model)
        optimizer.step()


OTHER = {
    "anchor": lambda rank: {"anchor": ["fit", "size"][rank]},
    "layers": lambda rank: {"layers": ["parameter", "module"][rank]},
    "balance_every": lambda rank: {"balance_every": [2, 3][rank]},
    "lr": lambda rank: {"lr": [0.1, 0.2][rank]},
    "betas": lambda rank: {"betas": (0.9, 0.99, [0.9, 0.8][rank])},
    "importance": lambda rank: {"importance": {"fit": 1.0 + rank}},
    "max_scale": lambda rank: {"max_scale": 2.0 + rank},
    "weight_decay": lambda rank: {"weight_decay": 0.1 * rank},
    "low_memory": lambda rank: {"low_memory": bool(rank)},
    "on_nonfinite": lambda rank: {"on_nonfinite": ["raise", "skip"][rank]},
}


@pytest.mark.parametrize("name", OTHER)
def test_ranks_with_other_options_raise_in_the_first_step_naming_the_option(name, tmp_path):
    for outcome in run_ranks(with_options, tmp_path, OTHER[name]):
        assert outcome.error.startswith(f"ValueError: The ranks have different values of the option {name}: rank 0 has")
        assert outcome.seconds < PATIENCE


def with_balancer(rank, make):
    network = make_network()
    model = DistributedDataParallel(nn.Sequential(network))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    balancer = make(rank)
    for batch in batches_of(rank):
        optimizer.zero_grad()
        balancer.backward(three_losses(network, batch, model), optimizer, model=model)
        optimizer.step()


BALANCERS = {
    "relax": lambda rank: MetaBalance(relax=0.5 + 0.1 * rank),
    "alpha": lambda rank: GradNorm("0.0.weight", alpha=1.0 + rank),
    "balancer": lambda rank: [MetaBalance(), GradNorm("0.0.weight")][rank],
}


@pytest.mark.parametrize("name", BALANCERS)
def test_balancers_with_other_options_raise_too(name, tmp_path):
    for outcome in run_ranks(with_balancer, tmp_path, BALANCERS[name]):
        assert outcome.error.startswith(f"ValueError: The ranks have different values of the option {name}")


def test_what_was_begun_by_others_is_completed_by_whoever_failed():
    sent = ((3, torch.float32, 0), (3, torch.float32, 0))
    begun = []

    class Done:
        def is_completed(self):
            return True

    one = averaging.Averaging(None, [torch.device("cpu")])
    real, averaging.dist.all_reduce = averaging.dist.all_reduce, lambda tensor, **_: begun.append(tensor) or Done()
    try:
        one.complete({0: agreement.Announcement(sent=sent), 1: agreement.Announcement(error="no")})
    finally:
        averaging.dist.all_reduce = real
    assert [tensor.tolist() for tensor in begun] == [[0, 0, 0]] * 2
