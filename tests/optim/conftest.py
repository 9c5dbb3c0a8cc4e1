"""What tests of the optimizer's numbers can be run with."""

import pytest

from lightning_mtadam import layout
from lightning_mtadam.optim import accelerate


@pytest.fixture
def _apart(monkeypatch):
    """Small parameters do not lie side by side, so that chunks are as of large ones."""
    monkeypatch.setattr(layout, "PACKED", -1)


@pytest.fixture
def _plain(monkeypatch):
    """Nothing is accelerated: every chunk is updated by Algorithm 1 as it is written."""
    monkeypatch.setattr(accelerate, "faster", lambda chunk, numbers, options: None)


@pytest.fixture(params=["side by side", "fused", "plain"])
def _every_way(request):
    """Each of the ways in which an eager step can run: the same laws hold in all of them."""
    for name in {"side by side": (), "fused": ("_apart",), "plain": ("_apart", "_plain")}[request.param]:
        request.getfixturevalue(name)
