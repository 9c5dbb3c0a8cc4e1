"""A two-rank run that is killed at random moments and resumed: ``python -m tests.distributed.interrupted --kills 20``.

Each time the run is killed by SIGKILL, after a random delay or the moment it begins to write a checkpoint, resumed from
its last checkpoint, and its end compared, bit for bit, with that of a run that nothing interrupted.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_mtadam import MTAdam, MultiTermLightningModule
from tests.distributed.ranks import HANGS

ROOT = Path(__file__).parents[2]
STEPS, EVERY, WIDTH = 60, 5, 800
Run = subprocess.Popen[bytes]


class Model(MultiTermLightningModule):
    """Draws its batches from the step and the rank, so that it goes on with the right ones after a resume."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(2 * self.global_step + self.global_rank)
        x = torch.randn(4, 8, generator=generator)
        output = self.network(x)
        return {"fit": (output - x.sum(1, keepdim=True)).square().mean(), "size": 30 * output.abs().mean()}

    def configure_optimizers(self):
        return MTAdam(self.named_parameters(), lr=1e-3)


class Started(pl.Callback):
    """Leaves a file once there is something to interrupt; ends its own process if it finds a file that says so."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        folder = Path(trainer.default_root_dir)
        (folder / f"started{trainer.global_rank}").touch()
        time.sleep(0.02)
        if trainer.is_global_zero and (folder / "terminate").exists():
            (folder / "terminate").unlink()
            os.kill(os.getpid(), signal.SIGTERM)


def run_rank(folder: Path) -> None:
    """What each rank runs."""
    torch.set_num_threads(1)
    trainer = pl.Trainer(
        default_root_dir=folder,
        strategy="ddp",
        accelerator="cpu",
        devices=2,
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(folder, save_last=True, every_n_train_steps=EVERY),
            OnExceptionCheckpoint(folder),
            Started(),
        ],
    )
    loader = DataLoader(torch.zeros(2 * STEPS, 1))
    stopped = folder / "on_exception.ckpt"
    trainer.fit(Model(), loader, ckpt_path=str(stopped) if stopped.exists() else "last")
    if trainer.global_step == STEPS:
        state = {"weights": trainer.model.state_dict(), "optimizer": trainer.optimizers[0].state_dict()["state"]}
        torch.save(state, folder / f"end{trainer.global_rank}.pt")


def start(folder: Path) -> Run:
    """Start both ranks in a process group of their own."""
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    with (folder / "stderr.txt").open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.distributed.interrupted", "--train", str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )


def start_again(folder: Path) -> Run:
    """Start what may have been stopped before."""
    for file in folder.glob("started*"):
        file.unlink()
    return start(folder)


def started(folder: Path, run: Run) -> None:
    """Return once both ranks train."""
    while run.poll() is None and not all((folder / f"started{rank}").exists() for rank in range(2)):
        time.sleep(0.01)


def kill_after(folder: Path, run: Run, delay: float) -> None:
    """Kill both ranks some time after the first step."""
    started(folder, run)
    time.sleep(delay)
    kill(run)


def kill_while_writing(folder: Path, run: Run, checkpoint: int) -> None:
    """Kill both ranks when something changes in the folder after so many checkpoints."""
    started(folder, run)
    seen, changes = _listing(folder), 0
    while run.poll() is None and changes <= checkpoint:
        if _listing(folder) != seen:
            seen, changes = _listing(folder), changes + 1
    kill(run)


def finish(folder: Path) -> None:
    """Run to the end, or go on to it."""
    run = start_again(folder)
    assert run.wait(HANGS) == 0, (folder / "stderr.txt").read_text()


def same_end(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights and states, on both ranks, bit for bit."""
    flat = [
        [value for part in _end(folder, rank).values() for value in _leaves(part)]
        for folder in (one, other)
        for rank in range(2)
    ]
    return all(len(values) == len(flat[0]) and all(map(torch.equal, values, flat[0])) for values in flat)


def _end(folder: Path, rank: int) -> dict[str, dict]:
    return torch.load(folder / f"end{rank}.pt")


def _leaves(part):
    return [leaf for value in part.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def _listing(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for entry in os.scandir(folder):
        try:
            found.add((entry.name, entry.stat().st_size))
        except FileNotFoundError:  # it was renamed meanwhile
            found.add((entry.name, -1))
    return found


def kill(run: Run) -> None:
    """Kill both ranks, if they run."""
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def main() -> None:
    """Kill and resume, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        return run_rank(options.train)
    draw = random.Random(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        whole.mkdir()
        finish(whole)
        for index in range(options.kills):
            folder = Path(root) / str(index)
            folder.mkdir()
            run = start(folder)
            if index % 2:
                change = draw.randrange(0, 20)
                kill_while_writing(folder, run, change)
                how = f"at change {change} of the folder"
            else:
                delay = draw.uniform(0, 1.5)
                kill_after(folder, run, delay)
                how = f"{delay:.2f} s after the first step"
            left = sorted(file.name for file in folder.glob("*.ckpt*"))
            finish(folder)
            same = same_end(whole, folder)
            failed += not same
            print(
                f"kill {index + 1}, {how}: found {left or 'nothing'}, end {'equal' if same else 'DIFFERENT'}",
                flush=True,
            )
    print(f"{options.kills - failed} of {options.kills} ended bit-identical to the run that nothing interrupted")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
