"""A run of two ranks that is killed or asked to stop goes on from its last checkpoint as if nothing had happened."""

import os
import signal
import time

import pytest

from tests.distributed.interrupted import finish, kill_after, kill_while_writing, same_end, start, started


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finish(folder)
    return folder


@pytest.mark.parametrize(
    ("kill", "when"),
    [(kill_after, 0.6), (kill_while_writing, 6)],
    ids=["while it trains", "while it writes a checkpoint"],
)
def test_a_killed_run_ends_as_one_that_was_not(kill, when, tmp_path, whole):
    kill(tmp_path, start(tmp_path), when)
    assert list(tmp_path.glob("*.ckpt")), "there is something to go on from"
    assert not list(tmp_path.glob("end*")), "it was not finished"
    finish(tmp_path)
    assert same_end(whole, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_asked_to_stop_saves_where_it_is(number, tmp_path, whole):
    run = start(tmp_path)
    started(tmp_path, run)
    time.sleep(0.3)
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # a terminal sends it to all
    else:
        os.kill(run.pid, number)
    run.wait(60)
    assert (tmp_path / "on_exception.ckpt").exists(), (tmp_path / "stderr.txt").read_text()
    finish(tmp_path)
    assert same_end(whole, tmp_path)
