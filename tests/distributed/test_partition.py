"""Terms that partition the batch, over several processes: ranks whose rows belong to other terms."""

import pytest
import torch
from torch import nn

from lightning_mtadam import partitioned_losses
from tests.distributed.cases import Case
from tests.distributed.ranks import TWO_OR_THREE, results, run_ranks
from tests.distributed.sharded import Network, needs_fsdp2, shard
from tests.distributed.training import STEPS, assert_ranks_equal_one_process, rounds
from tests.lightning_models import QUIET

pytestmark = QUIET

TERMS = ("low", "middle", "high")


def term_of(x):
    """By the rows' first entries: with four rows a rank, terms are often missing."""
    return torch.bucketize(x[:, 0].contiguous(), torch.tensor([-0.8, 0.8], dtype=x.dtype))


def partitioned(network, batch, step, rank):
    x, y = batch
    return partitioned_losses(lambda x, y: (network(x) - y).square().mean(1), (x, y), term_of(x), TERMS)


CASES = {
    "plain": Case(partitioned, optimizer={"terms": TERMS}),
    "accumulation and clipping": Case(
        partitioned,
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.01},
        optimizer={"terms": TERMS, "eps": 1e-2, "anchor": "mean"},
    ),
}


@TWO_OR_THREE
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process_on_the_joined_batch(name, ranks, tmp_path):
    assert_ranks_equal_one_process(CASES[name], ranks, tmp_path)


def test_terms_are_missing_on_one_rank_and_on_all():
    """Nothing above would be shown otherwise."""
    missing = [
        [set(range(3)) - set(term_of(x).tolist()) for x, _ in parts] for parts in rounds(2, STEPS, torch.float64)
    ]
    assert any(one != other for one, other in missing)
    assert any(one & other for one, other in missing)


def of_one_term(rank):
    losses = partitioned_losses(lambda x: x.sum(1), torch.ones(2, 3, requires_grad=True), torch.tensor([1, 1]), TERMS)
    return [(name, float(loss.detach()), loss.dtype, loss.requires_grad) for name, loss in losses.items()]


@pytest.mark.parametrize(("ranks", "names"), [(1, ["middle"]), (2, list(TERMS))])
def test_a_term_without_rows_is_a_constant_zero_among_several_processes(ranks, names, tmp_path):
    for found in results(run_ranks(of_one_term, tmp_path, ranks=ranks)):
        expected = {name: (name, 0.0, torch.float32, False) for name in TERMS}
        assert found == [{**expected, "middle": ("middle", 3.0, torch.float32, True)}[name] for name in names]


class Sharded(nn.Module):
    """Owns the function, as a LightningModule does."""

    def __init__(self):
        super().__init__()
        self.network = shard(Network())

    def per_row(self, x):
        return self.network(x)[1].sum(1)


def with_shards(rank):
    partitioned_losses(Sharded().per_row, torch.ones(2, 5, dtype=torch.float64), torch.tensor([rank, rank]), TERMS)


@needs_fsdp2
def test_a_sharded_network_is_refused_on_every_rank(tmp_path):
    for outcome in run_ranks(with_shards, tmp_path):
        assert outcome.error.startswith("ValueError: The network is sharded, so that every forward pass needs all")
