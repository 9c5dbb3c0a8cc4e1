"""Every test here runs on the stand-in accelerator, and says why where it cannot.

A process in which anything was differentiated cannot get to know another device. So these tests run in processes of
their own: ``tests/test_accelerator.py`` starts one for each file, and ``pytest tests/accelerator`` runs them alone.
"""

from pathlib import Path

import pytest
import torch

from tests.accelerator import device
from tests.accelerator.training import DEVICE

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path, config):
    """Leave them out of a run that has other tests, too."""
    asked = [(config.invocation_params.dir / str(argument).partition("::")[0]).resolve() for argument in config.args]
    return None if all(path.is_relative_to(HERE) for path in asked) else True


def pytest_configure(config):
    config.addinivalue_line("markers", "stand_in: counts kernels or waits, which the stand-in alone can")
    config.addinivalue_line("markers", "two_devices: needs two of the devices")


def pytest_collection_modifyitems(config, items):
    """Leave out what the device that is asked for cannot show."""
    if DEVICE == device.NAME:
        return
    one = torch.get_device_module(DEVICE).device_count() < 2
    kept = [item for item in items if not item.get_closest_marker("stand_in")]
    items[:] = [item for item in kept if not (one and item.get_closest_marker("two_devices"))]


@pytest.fixture(scope="session", autouse=True)
def _registered():
    if DEVICE != device.NAME:
        return
    reason = device.why_not()
    if reason is not None:
        pytest.skip(reason)
    device.register()


@pytest.fixture(autouse=True)
def _first_device_at_the_end():
    yield
    torch.get_device_module(DEVICE).set_device(0)
    torch.set_default_device(None)
