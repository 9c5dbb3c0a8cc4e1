"""Ctrl-C waits until a step is whole."""

import os
import signal

import pytest

from lightning_mtadam import balancing
from lightning_mtadam.distributed.uninterrupted import uninterrupted
from tests.lightning_models import assert_same, make_loader, make_mtadam, make_network, three_losses


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_until_the_block_has_ended():
    done = []

    @uninterrupted()
    def block():
        press_ctrl_c()
        done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait():
    done = []

    @uninterrupted()
    def block():
        press_ctrl_c()
        press_ctrl_c()
        done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert not done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_is_called_and_stays():
    called = []

    def handler(number, frame):
        called.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with uninterrupted():
            press_ctrl_c()
            assert not called
        assert called == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_step_leaves_a_whole_step(monkeypatch):
    batch = next(iter(make_loader(1)))
    stopped, whole = make_network(), make_network()
    optimizers = [make_mtadam(network) for network in (stopped, whole)]
    for network, optimizer in zip((stopped, whole), optimizers, strict=True):
        optimizer.backward(three_losses(network, batch))
    optimizers[1].step()
    tick = balancing.tick

    def interrupted(*arguments):
        press_ctrl_c()
        return tick(*arguments)

    monkeypatch.setattr(balancing, "tick", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizers[0].step()
    assert_same(stopped, whole)
