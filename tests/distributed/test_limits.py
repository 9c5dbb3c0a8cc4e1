"""What cannot be had under DistributedDataParallel says so, on every rank."""

import pytest
import torch

from tests.distributed.cases import Case, make_normed
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Trained, fit_rank, rounds
from tests.lightning_models import QUIET, SumRegression

pytestmark = QUIET


def fit_with_hook(rank):
    hook = {"ddp_comm_hook": lambda state, bucket: bucket}
    fit_rank(Trained(Case(), rank, torch.float64), rank, rounds(2, 1, torch.float64), strategy=hook)


def test_a_communication_hook_is_refused_on_every_rank(tmp_path):
    for outcome in run_ranks(fit_with_hook, tmp_path):
        assert outcome.error.startswith("MisconfigurationException: A DDP communication hook (ddp_comm_hook) would")


def torchs_own_sync_batch_norm(rank):
    module = Trained(Case(network=make_normed), rank, torch.float64)
    fit_rank(module, rank, rounds(2, 1, torch.float64), sync_batchnorm=True)


def test_torchs_sync_batch_norm_says_that_it_does_not_run_on_a_cpu(tmp_path):
    """Which is why ``SyncedBatchNorm`` stands in for it in these tests."""
    for outcome in run_ranks(torchs_own_sync_batch_norm, tmp_path):
        assert outcome.error.startswith("ValueError: SyncBatchNorm layers only work with GPU modules")


def accumulate_on_a_static_graph(rank, make_module):
    options = {"strategy": {"static_graph": True}, "accumulate_grad_batches": 2}
    fit_rank(make_module(rank), rank, rounds(2, 4, torch.float64), **options)


@pytest.mark.parametrize(
    "make_module",
    [
        lambda rank: Trained(Case(), rank, torch.float64),
        lambda rank: SumRegression(lambda network: torch.optim.Adam(network.parameters())),
    ],
    ids=["MTAdam", "Adam"],
)
def test_static_graph_and_accumulation_fail_in_torch_whatever_the_optimizer(make_module, tmp_path):
    for outcome in run_ranks(accumulate_on_a_static_graph, tmp_path, make_module):
        assert outcome.error.startswith("RuntimeError: expect_autograd_hooks_ INTERNAL ASSERT FAILED")
