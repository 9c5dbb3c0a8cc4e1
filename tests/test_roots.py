"""Where the two packages of Lightning are mixed, the message says what to import."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import lightning_mtadam
import lightning_mtadam.pytorch_lightning as twin
from lightning_mtadam.callbacks import BalanceWeightMonitor
from lightning_mtadam.pytorch_lightning.callbacks import BalanceWeightMonitor as TwinMonitor
from tests.lightning_models import QUIET, make_loader, make_network
from tests.pytorch_lightning.both import PACKAGES, module, other, trainer

pytestmark = [QUIET, pytest.mark.filterwarnings("ignore:.*litlogger")]

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture(params=PACKAGES)
def here(request, monkeypatch):
    """The name of a package, whose trainers have what this package's entry point gives them."""
    group = re.escape(f'[project.entry-points."{request.param}.callbacks_factory"]')
    name, value = re.search(rf'{group}\n(\w+) = "([\w.:]+)"', PYPROJECT.read_text()).groups()
    place = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}[request.param]
    point = EntryPoint(name, value, "")
    monkeypatch.setattr(f"{place}.utilities.registry.entry_points", lambda group: [point])
    return request.param


def message(given, package, place, name):
    home = {"lightning.pytorch": "lightning_mtadam", "pytorch_lightning": "lightning_mtadam.pytorch_lightning"}[package]
    return re.escape(
        f"{given} is for trainers of {other(package)}, but this Trainer is of {package}."
        f" Write from {home}{place} import {name}; or import the Trainer"
    )


@pytest.mark.parametrize("change", [lambda model: model, torch.compile])
def test_a_module_for_the_other_packages_trainers_is_refused(change, here):
    with pytest.raises(TypeError, match=message("Regression", here, "", "MultiTermLightningModule")):
        trainer(here).fit(change(module(other(here))), make_loader())


def test_a_callback_for_the_other_packages_trainers_is_refused(here):
    monitor = {"lightning.pytorch": TwinMonitor, "pytorch_lightning": BalanceWeightMonitor}[here]

    class Own(monitor):
        pass

    with pytest.raises(TypeError, match=message("Own", here, ".callbacks", "BalanceWeightMonitor")):
        trainer(here, callbacks=[Own()]).fit(module(here), make_loader())


def test_modules_and_callbacks_of_the_same_package_are_let_be(here):
    scheduler = "ImportanceScheduler"
    place = twin if here == "pytorch_lightning" else lightning_mtadam
    made = getattr(__import__(f"{place.__name__}.callbacks", fromlist=[scheduler]), scheduler)
    trainer(here, callbacks=[made({"size": lambda step: 0.5})]).fit(module(here), make_loader())


def test_what_is_no_module_at_all_is_lightnings_to_refuse(here):
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
        trainer(here).fit(make_network(), make_loader())
