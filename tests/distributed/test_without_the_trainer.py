"""The programs of ``docs/without_the_trainer.md``, run from the page as it tells to, against a bare loop."""

import importlib
import os
import shlex
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from lightning_mtadam import MTAdam
from tests.distributed.ranks import HANGS, results, run_ranks
from tests.distributed.sharded import difference, needs_fsdp2
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "without_the_trainer.md"
PROGRAMS = ("problem.py", "plain.py", "train.py", "train_sharded.py", "train_fabric.py")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder with every program of the page, from which they are imported."""
    for block in blocks(PAGE, "py"):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PROGRAMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in PROGRAMS:
        sys.modules.pop(name.removesuffix(".py"), None)


def by_hand(batches=12):
    """One process, on the batches of all; every second one steps."""
    problem = importlib.import_module("problem")
    network = problem.Autoencoder()
    optimizer = MTAdam(network.named_parameters(), lr=1e-2)
    for index, x in enumerate(problem.make_data().tensors[0].split(32)[:batches]):
        losses = problem.losses_of(x, *network(x))
        optimizer.backward({name: loss / 2 for name, loss in losses.items()})
        if index % 2:
            optimizer.clip_gradients(1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert difference(network.state_dict(), problem.Autoencoder().state_dict()) > 0.01, "it has been trained"
    return network.state_dict()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0), (torch.float16, 2e-3)])
def test_the_plain_loop_equals_one_by_hand(dtype, tolerance, programs):
    network, _, scaler = importlib.import_module("plain").main(dtype)
    assert difference(network.state_dict(), by_hand()) <= tolerance
    assert scaler.is_enabled() == (dtype == torch.float16)


def test_a_scaler_skips_what_overflows_and_goes_on(programs, monkeypatch):
    plain = importlib.import_module("plain")
    losses_of, seen = plain.losses_of, []

    def overflowing(x, code, output):
        seen.append(x)
        losses = losses_of(x, code, output)
        return {**losses, "code": losses["code"] * (1e36 if len(seen) == 3 else 1)}

    monkeypatch.setattr(plain, "losses_of", overflowing)
    _, optimizer, scaler = plain.main()
    assert {float(state["step"][0]) for state in optimizer.state.values()} == {5}, "of six steps one is skipped"
    assert scaler.get_scale() == 128


def test_torchrun_equals_one_process(programs):
    (command,) = blocks(PAGE, "bash")
    python, *arguments = shlex.split(command)
    assert python == "python"
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    saved = torch.load("checkpoint.pt")
    assert difference(saved["network"], by_hand()) < 1e-6
    assert saved["optimizer"]["param_groups"][0]["terms"] == ("reconstruction", "code")


def run_sharded(rank):
    """As torchrun would, but that the processes are there already."""
    sharded, train = (importlib.import_module(name) for name in ("train_sharded", "train"))
    train.wrap, train.save = sharded.wrap, sharded.save
    train.dist.init_process_group = lambda backend: None
    train.main()


@needs_fsdp2
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_sharded_variation_equals_one_process(programs):
    (programs / "ranks").mkdir()
    results(run_ranks(run_sharded, programs / "ranks"))
    network = importlib.import_module("problem").Autoencoder()
    state = {"network": network.state_dict()}
    dcp.load(state, checkpoint_id="checkpoint", no_dist=True)
    assert difference(state["network"], by_hand()) < 1e-6


def run_fabric(rank, precision):
    fabric = importlib.import_module("train_fabric")
    model, optimizer = fabric.main(precision=precision)
    return model.state_dict(), optimizer.state_dict(), dist.get_world_size()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("bf16-mixed", 1e-2)])
def test_the_fabric_loop_equals_one_process(precision, tolerance, programs):
    (programs / "ranks").mkdir()
    for weights, state, ranks in results(run_ranks(run_fabric, programs / "ranks", precision)):
        assert ranks == 2
        assert difference(weights, by_hand(batches=6)) < tolerance, "as it was when it was saved"
        assert {float(found["step"][0]) for found in state["state"].values()} == {3}
