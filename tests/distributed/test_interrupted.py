"""A run of two ranks that is killed or asked to stop goes on from its last checkpoint as if nothing had happened."""

import os
import signal
import time

from tests.distributed.interrupted import finish, kill_while_writing, same_end, start, start_again, started


def stop(folder, number):
    """Ask a run to stop somewhere in its midst; a terminal's Ctrl-C goes to all its processes."""
    run = start_again(folder)
    started(folder, run)
    time.sleep(0.2)
    if number == signal.SIGINT:
        os.killpg(run.pid, number)
    else:
        os.kill(run.pid, number)
    run.wait(60)
    assert (folder / "on_exception.ckpt").exists(), (folder / "stderr.txt").read_text()
    assert not list(folder.glob("end*")), "it was not finished"


def test_a_run_that_is_killed_and_stopped_ends_as_one_that_was_not(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    finish(whole)
    kill_while_writing(stopped, start(stopped), 3)
    assert list(stopped.glob("*.ckpt")), "there is something to go on from"
    assert not list(stopped.glob("end*")), "it was not finished"
    stop(stopped, signal.SIGINT)
    stop(stopped, signal.SIGTERM)
    finish(stopped)
    assert same_end(whole, stopped)
