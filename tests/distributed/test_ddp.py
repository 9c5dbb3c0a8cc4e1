"""Two real processes over gloo: equal to each other to the bit, and to one process on the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.distributed.ddp_run import BATCH, CASES, RANKS, Model, dataset, trainer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers")


def run_ranks(folder, case):
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.ddp_run", str(folder), case]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def assert_bitwise(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, dict):
            assert_bitwise(value, theirs[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("case", ["plain", "accumulation", "clipping", "changing"])
def test_two_ranks_equal_one_process(case, tmp_path):
    result = run_ranks(tmp_path, case)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS))
    assert_bitwise(first["weights"], second["weights"])
    assert_bitwise(first["optimizer"]["state"], second["optimizer"]["state"])

    data = dataset()
    order = [  # batch after batch, what the ranks see together
        index
        for start in range(0, len(data), RANKS * BATCH)
        for rank in range(RANKS)
        for index in range(start + rank, start + RANKS * BATCH, RANKS)
    ]
    one = Model(case)
    trainer(devices=1, **CASES[case]).fit(one, DataLoader(data, RANKS * BATCH, sampler=order))
    start = Model().state_dict()
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-6)
        assert (weight - start[name]).abs().max() > 0.01, "it has been trained"


def test_ranks_with_different_terms_raise_and_name_them(tmp_path):
    result = run_ranks(tmp_path, "own_terms")
    assert result.returncode != 0
    assert "The ranks have different terms: rank 0 has ('fit', 'trunk'); rank 1 has ('fit', 'trunk', 'third')" in (
        result.stderr
    )


def test_a_bad_loss_on_one_rank_raises_on_all(tmp_path):
    result = run_ranks(tmp_path, "bad_rank")
    assert result.returncode != 0
    assert "losses['fit'] must be a scalar tensor, but has shape (4, 3)" in result.stderr
    assert "another rank has failed. rank 1: ValueError: losses['fit'] must be a scalar tensor" in result.stderr
