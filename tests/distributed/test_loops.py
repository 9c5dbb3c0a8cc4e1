"""Loops written by hand around DistributedDataParallel, without Lightning."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.ranks import PATIENCE, TWO_OR_THREE, results, run_ranks
from tests.distributed.training import ROUNDING, STEPS, Wrapped, all_equal, ddp_loop, joined_rounds, largest, rounds
from tests.lightning_models import make_mtadam, make_network, three_losses
from tests.loops import hand_loop


def parameters_of(network):
    return [parameter.detach() for parameter in network.parameters()]


def alone(batches, dtype=torch.float64, accumulate=1):
    network = make_network(dtype)
    hand_loop(network, make_mtadam(network), batches, epochs=1, accumulate=accumulate)
    return parameters_of(network)


def train_wrapped(rank, ranks, accumulate):
    found = []
    for dtype in ROUNDING:
        network = make_network(dtype)
        batches = [parts[rank] for parts in rounds(ranks, STEPS * accumulate, dtype)]
        ddp_loop(Wrapped(network), make_mtadam(network), batches, accumulate)
        found.append(parameters_of(network))
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@TWO_OR_THREE
def test_a_hand_written_loop_equals_one_process_also_with_no_sync(ranks, accumulate, tmp_path):
    together = results(run_ranks(train_wrapped, tmp_path, ranks, accumulate, ranks=ranks))
    for dtype, (first, *others) in zip(ROUNDING, zip(*together, strict=True), strict=True):
        assert all(all_equal(first, other) for other in others)
        expected = alone(joined_rounds(ranks, STEPS * accumulate, dtype), dtype, accumulate)
        assert largest(first, expected) < ROUNDING[dtype]


def train_without_sync(rank):
    network = make_network()
    model = Wrapped(network)
    optimizer = make_mtadam(network)
    for parts in rounds(2, STEPS, torch.float64):
        with model.no_sync():
            optimizer.backward(three_losses(model, parts[rank]), model=model)
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(network)


def test_within_no_sync_nothing_is_averaged(tmp_path):
    first, second = results(run_ranks(train_without_sync, tmp_path))
    for rank, found in enumerate((first, second)):
        assert all_equal(found, alone([parts[rank] for parts in rounds(2, STEPS, torch.float64)]))
    assert largest(first, second) > 1e-3


def train_in_groups(rank):
    """Ranks 0 and 2 train one network, rank 1 another one by itself."""
    network = make_network()
    group = dist.new_group([0, 2], backend="gloo")
    batches = [parts[rank] for parts in rounds(3, STEPS, torch.float64)]
    ddp_loop(network if rank == 1 else Wrapped(network, process_group=group), make_mtadam(network), batches)
    return parameters_of(network)


def test_those_processes_train_together_that_the_wrapper_joins(tmp_path):
    first, single, third = results(run_ranks(train_in_groups, tmp_path, ranks=3))
    batches = rounds(3, STEPS, torch.float64)
    assert all_equal(first, third)
    joined = [[torch.cat([parts[0][i], parts[2][i]]) for i in range(2)] for parts in batches]
    assert largest(first, alone(joined)) < 1e-12
    assert all_equal(single, alone([parts[1] for parts in batches]))


def differ_in_groups(rank):
    """Rank 2 of the ranks 0 and 2 lacks a term."""
    group = dist.new_group([0, 2], backend="gloo")
    if rank == 1:
        return
    model = Wrapped(make_network(), process_group=group)
    losses = three_losses(model, rounds(1, 1, torch.float64)[0][0])
    if rank == 2:
        del losses["size"]
    make_mtadam(model.module).backward(losses, model=model)


def test_messages_count_ranks_over_all_processes(tmp_path):
    first, _, third = run_ranks(differ_in_groups, tmp_path, ranks=3)
    for outcome in (first, third):
        assert "rank 0 has ('fit', 'size', 'decay'); rank 2 has ('fit', 'decay')." in outcome.error


def with_one_process_in_the_group(rank):
    groups = [dist.new_group([member], backend="gloo") for member in range(2)]
    network = make_network()
    batches = [parts[rank] for parts in rounds(2, STEPS, torch.float64)]
    ddp_loop(Wrapped(network, process_group=groups[rank]), make_mtadam(network), batches)
    return parameters_of(network)


def test_a_wrapper_around_a_single_process_changes_nothing(tmp_path):
    for rank, found in enumerate(results(run_ranks(with_one_process_in_the_group, tmp_path))):
        assert all_equal(found, alone([parts[rank] for parts in rounds(2, STEPS, torch.float64)]))


class FullyShardedDataParallel(nn.Module):
    """Named as what is refused."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)

    def __getitem__(self, index):
        return self.module[index]


def hooked(network):
    model = Wrapped(network)
    model.register_comm_hook(None, lambda state, bucket: bucket)
    return model


def joined(network):
    model = Wrapped(network)
    model._join_config = model._join_config._replace(enable=True)  # as within model.join()
    return model


REFUSED = {
    "join": (joined, r"model.join\(\) cannot stand in for a rank that has run out of batches"),
    "forgotten": (lambda network: None, "2 processes are running, but nothing says whether they train together"),
    "communication hook": (hooked, "A DDP communication hook .* would not be applied to the gradients of the terms"),
    "FSDP1": (FullyShardedDataParallel, r"FullyShardedDataParallel \(FSDP1\) hides the parameters .* Use FSDP2"),
}


def use_refused(rank, name):
    network = make_network()
    optimizer = make_mtadam(network)
    model = REFUSED[name][0](network)
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        optimizer.backward(three_losses(model or network, rounds(2, 1, torch.float64)[0][rank]), model=model)
    assert optimizer.terms == ()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_on_every_rank(name, tmp_path):
    results(run_ranks(use_refused, tmp_path, name))


def train_with_other_accumulation(rank):
    network = make_network()
    ddp_loop(Wrapped(network), make_mtadam(network), [parts[rank] for parts in rounds(2, 4, torch.float64)], rank + 1)


def test_ranks_that_accumulate_while_others_average_raise_on_every_rank(tmp_path):
    for outcome in run_ranks(train_with_other_accumulation, tmp_path):
        assert outcome.error.startswith("ValueError: Only the ranks [0] average gradients in this batch")
        assert outcome.seconds < PATIENCE


def train_rarely(rank):
    network = make_network()
    model, optimizer = Wrapped(network), make_mtadam(network)
    clocks = []
    for step, batch in enumerate(parts[rank] for parts in rounds(2, 4, torch.float64)):
        losses = three_losses(model, batch)
        if (step, rank) in ((1, 1), (2, 0), (2, 1)):
            losses["size"] = torch.zeros((), dtype=torch.float64)
        optimizer.backward(losses, model=model)
        optimizer.step()
        optimizer.zero_grad()
        clocks.append(optimizer.gradient_norms()["0.weight"][1])
    return parameters_of(network), clocks


def test_a_term_that_no_rank_has_anything_for_counts_as_absent(tmp_path):
    (first, norms), (second, _) = results(run_ranks(train_rarely, tmp_path))
    assert all_equal(first, second)
    assert norms[0] != norms[1], "one rank had something"
    assert norms[1] == norms[2], "none had: the norm is frozen"
    assert norms[2] != norms[3]


def average_large_numbers(rank):
    network = nn.Linear(1, 1, bias=False).half()
    model, optimizer = DistributedDataParallel(network), make_mtadam(network)
    optimizer.backward({"large": 40000 * model(torch.ones(1, 1).half()).sum()}, model=model)
    return network.weight.grad


def test_the_average_of_large_half_precision_numbers_does_not_overflow(tmp_path):
    for gradient in results(run_ranks(average_large_numbers, tmp_path)):
        assert gradient.item() == 40000


def save_wrapped(rank, file):
    model = Wrapped(make_network())
    optimizer = make_mtadam(model)
    ddp_loop(model, optimizer, [parts[rank] for parts in rounds(2, 2, torch.float64)])
    if rank == 0:
        torch.save(optimizer.state_dict(), file)
    return list(optimizer.balance_weights())


def test_a_checkpoint_of_a_wrapped_network_fits_the_bare_one(tmp_path):
    (tmp_path / "ranks").mkdir()
    for layers in results(run_ranks(save_wrapped, tmp_path / "ranks", tmp_path / "saved")):
        assert layers == ["0.weight", "0.bias", "2.weight", "2.bias"]
    optimizer = make_mtadam(make_network())
    optimizer.load_state_dict(torch.load(tmp_path / "saved"))
    assert optimizer.terms == ("fit", "size", "decay")
    assert all(bool(norms.any()) for norms in optimizer.gradient_norms().values())
