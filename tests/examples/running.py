"""What the tests of example projects share: commands that are called and read, and runs that end before their time."""

import contextlib
import csv
import hashlib
import io
import signal

import lightning.pytorch as pl
import pytest
import torch

from example_projects.common import runs
from example_projects.common.command import UNREMARKABLE

# For runs without the command, which silences the same.
QUIET = [pytest.mark.filterwarnings(f"ignore:{message}") for message in UNREMARKABLE]


def output_of(main, *arguments):
    """Run a command and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([str(argument) for argument in arguments])
    return printed.getvalue()


def read_rows(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def read_results(folder):
    """A row per run, in their order."""
    return read_rows(folder / "results.csv")


def untimed(rows):
    """The rows but for what differs from one call to the next."""
    return [{**row, "seconds_per_step": ""} for row in rows]


def assert_row_of_each(methods, columns, output, printed):
    """Fail unless a command has printed and kept a table with a row for each method.

    Returns:
        For each method its result, and the cells of its row.
    """
    table = (output / "table.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["method", "runs", *columns]
    assert [row[:2] for row in rows[2:]] == [[method, "1"] for method in methods]
    assert table in printed
    results = read_results(output)
    assert [row["method"] for row in results] == list(methods)
    return list(zip(results, rows[2:], strict=True))


def run_quietly(folder, module, data, metric, **options):
    """A run without a command, on the CPU, whose result is a metric of the test."""
    return runs.run(
        folder,
        module,
        data,
        lambda trainer: {metric: float(trainer.callback_metrics[f"test/{metric}"])},
        accelerator="cpu",
        enable_progress_bar=False,
        log_every_n_steps=1,
        **options,
    )


def load_checkpoint(run):
    """The last checkpoint in the folder of a run."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)


def assert_same_weights(found, expected):
    """Compare two state dicts, bit for bit."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        difference = (found[name].double() - weight.double()).abs().max().item()
        assert torch.equal(found[name], weight), f"{name} is off by {difference:.1e}"


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def digest(tensors):
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


class EndedError(Exception):
    """The run was ended from outside."""


class InterruptAt(pl.Callback):
    """Ends a run before its n-th batch, and keeps what was trained on until then: step and digest of each batch."""

    def __init__(self, batch=None):
        self.left, self.seen = batch, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if len(self.seen) == self.left:
            raise EndedError
        self.seen.append((trainer.global_step, digest(batch)))


class CtrlCAt(pl.Callback):
    """Presses Ctrl-C once, while the n-th batch is being trained."""

    def __init__(self, batch):
        self.batch = batch

    def on_before_optimizer_step(self, trainer, *args):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            self.batch = None
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def stopped_by_ctrl_c(capsys, step):
    """What is done within ends by Ctrl-C after that step, and says how to go on."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        yield
    signal.signal(signal.SIGINT, before)
    assert f"Stopped after step {step}. The same command with --resume" in capsys.readouterr().out
