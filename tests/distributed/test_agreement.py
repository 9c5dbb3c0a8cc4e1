"""What differs between the ranks, or fails on one of them, raises on all of them within seconds; none hangs."""

import os
import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_mtadam import MTAdam
from lightning_mtadam.distributed import agreement
from tests.distributed.cases import Case, make_synced, plain
from tests.distributed.ranks import PATIENCE, run_ranks
from tests.distributed.training import Trained, fit_rank, rounds
from tests.lightning_models import QUIET

pytestmark = QUIET

BATCHES = 6


def fit_differently(rank, ranks, make_module):
    fit_rank(make_module(rank), rank, rounds(ranks, BATCHES, torch.float64))


def errors(folder, make_module, ranks=2):
    """What the ranks raised; checks that they did within seconds."""
    outcomes = run_ranks(fit_differently, folder, ranks, make_module, ranks=ranks)
    assert all(outcome.seconds < PATIENCE for outcome in outcomes)
    return [outcome.error for outcome in outcomes]


class Differing(Trained):
    """From a batch on, a rank does something else."""

    def __init__(self, rank, change, bad, first, case=None):
        super().__init__(case or Case(), rank, torch.float64)
        self.change, self.bad, self.first = change, bad, first

    def training_step(self, batch, batch_idx):
        if self.rank != self.bad or batch_idx < self.first:
            return super().training_step(batch, batch_idx)
        return self.change(self.network, plain(self.network, batch, batch_idx, self.rank))


def without(network, losses):
    return {name: loss for name, loss in losses.items() if name != "size"}


def renamed(network, losses):
    return {"sise" if name == "size" else name: loss for name, loss in losses.items()}


def frozen(network, losses):
    network[2].bias.requires_grad_(False)
    return losses


def raising(network, losses):
    raise OSError("the disk is full")


ALL = "('fit', 'size', 'decay')"
OTHER = {  # the change, and what is said of the ranks before it and after it
    "a missing term": (without, ALL, "('fit', 'decay')"),
    "another term": (lambda network, losses: losses | {"new": losses["fit"]}, ALL, "('fit', 'size', 'decay', 'new')"),
    "a renamed term": (renamed, ALL, "('fit', 'sise', 'decay')"),
}


@pytest.mark.parametrize(("ranks", "bad"), [(2, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("name", OTHER)
def test_ranks_with_other_terms_raise_saying_which_rank_has_what(name, ranks, bad, tmp_path):
    change, expected, other = OTHER[name]
    found = "; ".join(f"rank {rank} has {other if rank == bad else expected}" for rank in range(ranks))
    for error in errors(tmp_path, partial(Differing, change=change, bad=bad, first=0), ranks):
        assert error.startswith(f"ValueError: The ranks have different terms: {found}. Every rank must return")


def test_a_term_that_is_missing_later_raises_too(tmp_path):
    for error in errors(tmp_path, partial(Differing, change=without, bad=1, first=3)):
        assert f"rank 0 has {ALL}; rank 1 has ('fit', 'decay')" in error


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_freezes_other_parameters_raises_on_every_rank(bad, first, tmp_path):
    found = "; ".join(f"rank {rank} has {'nothing else' if rank == bad else '2.bias (2,)'}" for rank in range(2))
    for error in errors(tmp_path, partial(Differing, change=frozen, bad=bad, first=first)):
        assert error.startswith(f"ValueError: The ranks train different parameters: beside what they share, {found}.")


def fails_in_backward(network, losses):
    def fail(gradient):
        raise OSError("the disk is full")

    losses["size"].register_hook(fail)
    return losses


FAILING = {
    "an error of the user's": (raising, "OSError: the disk is full"),
    "an error in a backward pass": (fails_in_backward, "OSError: the disk is full"),
    "an unreduced loss": (
        lambda network, losses: losses | {"fit": torch.ones(4, requires_grad=True)},
        "ValueError: losses['fit'] must be a scalar tensor, but has shape (4,)",
    ),
    "a number": (lambda network, losses: losses | {"fit": 1.0}, "TypeError: losses['fit'] must be a scalar tensor"),
    "nan": (
        lambda network, losses: losses | {"size": losses["size"] * torch.nan},
        "NonFiniteError: losses['size'] is nan. Nothing was changed.",
    ),
    "no terms": (lambda network, losses: {}, "ValueError: losses is empty"),
    "nothing": (
        lambda network, losses: None,
        "Skipping the `training_step` by returning None in distributed training is not supported",
    ),
}


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("name", FAILING)
def test_a_rank_that_fails_tells_the_others(name, first, tmp_path):
    change, message = FAILING[name]
    others, own = errors(tmp_path, partial(Differing, change=change, bad=1, first=first))
    assert message in own
    assert others.startswith("RankError: Stopped, because another rank has failed. rank 1: ")
    assert message in others


def wherever_it_stands(rank, make_module):
    agreement.PATIENCE = 1  # how long the failing rank waits for a rank that does not listen
    fit_differently(rank, 2, make_module)


def is_killed(network, losses):
    os._exit(1)


class FailingBeforeTheNorm(Differing):
    """A rank fails while the others are in the forward pass, in a collective of their own."""

    def training_step(self, batch, batch_idx):
        if self.rank == self.bad and batch_idx == self.first:
            raise OSError("the disk is full")
        return super().training_step(batch, batch_idx)


ELSEWHERE = {
    "killed": (partial(Differing, change=is_killed), "gone"),
    "fails while the others are in a collective": (
        partial(FailingBeforeTheNorm, change=raising, case=Case(network=make_synced)),
        "OSError: the disk is full",
    ),
}


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_rank_that_is_lost_does_not_leave_the_others_waiting(name, first, tmp_path):
    make_module, own_error = ELSEWHERE[name]
    outcomes = run_ranks(wherever_it_stands, tmp_path, partial(make_module, bad=1, first=first))
    others, own = outcomes
    assert own.error == own_error
    assert re.match(
        "(Rank|Runtime)Error: (Another process of this training has stopped|.*Connection closed)", others.error
    )
    assert others.seconds < PATIENCE


def everywhere(change):
    class Same(Trained):
        def training_step(self, batch, batch_idx):
            return change(self.network, super().training_step(batch, batch_idx))

    return lambda rank: Same(Case(), rank, torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda network, losses: dict.fromkeys(losses, torch.zeros(())), "losses['fit'] has no graph on any rank"),
        (lambda network, losses: losses | {"fit": torch.ones(())}, "losses['fit'] has no graph, so it reaches"),
        (
            lambda network, losses: losses | {"fit": nn.Linear(3, 1).weight.sum()},
            "losses['fit'] reaches no parameter of the optimizer",
        ),
    ],
)
def test_a_term_that_reaches_nothing_on_any_rank_raises_on_every_rank(change, message, tmp_path):
    for error in errors(tmp_path, everywhere(change)):
        assert error.startswith(f"ValueError: {message}")


class OwnNetwork(Trained):
    """Another network on every rank."""

    def __init__(self, rank, spoil):
        super().__init__(Case(), rank, torch.float64)
        spoil(self, rank)


def swap(module, rank):
    """Give the parameters to the optimizer in another order."""
    module.configure_optimizers = lambda: MTAdam(list(module.named_parameters())[:: 1 - 2 * rank])


def rename(module, rank):
    """Give one of them another name."""
    named = [(f"{name}.{rank}" if name == "network.2.bias" else name, p) for name, p in module.named_parameters()]
    module.configure_optimizers = lambda: MTAdam(named)


def freeze(module, rank):
    module.network[2].bias.requires_grad_(rank == 0)


NETWORKS = {
    "another order": (swap, "ValueError: The ranks give the same parameters to the optimizer in another order."),
    "another name": (rename, "rank 0 has network.2.bias.0 (2,); rank 1 has network.2.bias.1 (2,). Build the same"),
    "frozen from the start": (freeze, "RuntimeError: DDP expects same model across all ranks"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_that_train_other_networks_raise_on_every_rank(name, tmp_path):
    """Some of them in DistributedDataParallel's own words."""
    spoil, message = NETWORKS[name]
    for error in errors(tmp_path, partial(OwnNetwork, spoil=spoil)):
        assert message in error


def accumulate_differently(rank):
    module = Trained(Case(), rank, torch.float64)
    fit_rank(module, rank, rounds(2, BATCHES, torch.float64), accumulate_grad_batches=1 + rank)


def test_ranks_that_accumulate_while_others_average_raise_on_every_rank(tmp_path):
    for outcome in run_ranks(accumulate_differently, tmp_path):
        assert outcome.error.startswith("ValueError: Only the ranks [0] average gradients in this batch")
        assert outcome.seconds < PATIENCE


def announce_a_constant(rank):
    mine = agreement.Announcement(("fit",), ("fit",) if rank else (), has_sync_batch_norm=rank == 1)
    agreement.compare(agreement.hear(mine, dist.group.WORLD))


def test_a_constant_term_beside_sync_batch_norm_raises_on_every_rank(tmp_path):
    for outcome in run_ranks(announce_a_constant, tmp_path):
        assert outcome.error.startswith(
            "ValueError: losses['fit'] has no graph on rank 1, but the network has SyncBatchNorm"
        )
