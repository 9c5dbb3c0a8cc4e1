"""A run of two ranks that is killed or asked to stop goes on from its last checkpoint as if nothing had happened."""

import contextlib
import os
import signal
import subprocess
import time

import pytest

from tests.distributed.interrupted import finish, kill, kill_while_writing, same_end, start, start_again, started
from tests.distributed.ranks import HANGS
from tests.lightning_models import needs_exact_resume


def interrupt(folder):
    """Press Ctrl-C, which a terminal sends to all processes."""
    run = start_again(folder)
    started(folder, run)
    time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)
    run.wait(HANGS)
    assert (folder / "on_exception.ckpt").exists(), (folder / "stderr.txt").read_text()


def terminate(folder):
    """End rank 0 by SIGTERM between two batches.

    Lightning (2.6) answers SIGTERM with a collective from within the signal's handler: sent at any moment, it may leave
    the ranks hanging, with any optimizer; sent here, once the checkpoint is written.
    """
    (folder / "on_exception.ckpt").unlink()
    (folder / "terminate").touch()
    run = start_again(folder)
    end = time.monotonic() + HANGS
    while not (folder / "on_exception.ckpt").exists():
        assert time.monotonic() < end, (folder / "stderr.txt").read_text()
        time.sleep(0.1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(5)
    kill(run)


@pytest.mark.slow
@needs_exact_resume
def test_a_run_that_is_killed_and_stopped_ends_as_one_that_was_not(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    finish(whole)
    kill_while_writing(stopped, start(stopped), 3)
    assert list(stopped.glob("*.ckpt")), "there is something to go on from"
    interrupt(stopped)
    terminate(stopped)
    assert not list(stopped.glob("end*")), "it was not finished"
    finish(stopped)
    assert same_end(whole, stopped)
