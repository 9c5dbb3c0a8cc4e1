"""Ranks that the Trainer starts, as it does for users; everything else about them is tested in forked processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from tests.distributed.launched import DATA, RANKS
from tests.distributed.ranks import HANGS
from tests.distributed.training import all_equal, largest
from tests.lightning_models import BATCH_SIZE, make_mtadam, make_network
from tests.loops import hand_loop

ROOT = Path(__file__).parents[2]


def launch(folder, case):
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.launched", str(folder), case]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS)


def test_two_launched_ranks_equal_one_process(tmp_path):
    result = launch(tmp_path, "plain")
    assert result.returncode == 0, result.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]
    first, second = ([parameter.detach() for parameter in parameters] for parameters in ranks)
    assert all_equal(first, second)
    network = make_network()
    hand_loop(network, make_mtadam(network), DataLoader(DATA, RANKS * BATCH_SIZE), epochs=1)
    assert largest(first, [parameter.detach() for parameter in network.parameters()]) < 1e-12


def test_a_launched_rank_that_fails_stops_the_run(tmp_path):
    result = launch(tmp_path, "error")
    assert result.returncode != 0
    assert "OSError: the disk is full" in result.stderr
    assert "another rank has failed. rank 1: OSError: the disk is full" in result.stderr
