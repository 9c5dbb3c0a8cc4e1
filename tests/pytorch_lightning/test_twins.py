"""``lightning_mtadam.pytorch_lightning``: the modules that know Lightning, from the same files, for the other one."""

import ast
import importlib
import inspect
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import lightning_mtadam
import lightning_mtadam.pytorch_lightning as twin
from lightning_mtadam.pytorch_lightning.twins import HERE, ROOMS, TwinImports, TwinLoader, twin_of
from tests.lightning_models import QUIET, assert_same, assert_same_state, make_loader
from tests.pytorch_lightning.both import module, trainer

PACKAGE = Path(lightning_mtadam.__file__).parent
FILES = sorted(path for room in ROOMS for path in [*PACKAGE.glob(f"{room}.py"), *PACKAGE.glob(f"{room}/**/*.py")])
NAMES = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in FILES]


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_is_made_of_the_same_file_and_uses_the_other_package_alone(name):
    other, original = importlib.import_module(twin_of(name)), importlib.import_module(name)
    assert other is not original
    assert other.__name__ == f"{HERE}{name.removeprefix('lightning_mtadam')}"
    assert other.__file__ == original.__file__
    tree = TwinImports().visit(ast.parse(Path(other.__file__).read_text()))
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [one for one in imported if one.split(".")[0] == "lightning"]
    assert not [one for one in imported if one.removeprefix("lightning_mtadam.").split(".")[0] in ROOMS]


@pytest.mark.parametrize("name", NAMES)
def test_classes_and_functions_are_where_they_say_and_show_their_source(name):
    other, original = importlib.import_module(twin_of(name)), importlib.import_module(name)
    own = {key: one for key, one in vars(other).items() if getattr(one, "__module__", None) == other.__name__}
    own = {key: one for key, one in own.items() if inspect.isclass(one) or inspect.isfunction(one)}
    for key, one in own.items():
        assert pickle.loads(pickle.dumps(one)) is one
        assert one is not getattr(original, key)
        assert inspect.getsource(one) == inspect.getsource(getattr(original, key))


def test_a_traceback_shows_the_lines_of_the_file():
    guard = importlib.import_module(f"{HERE}.guard")
    with pytest.raises(TypeError) as raised:
        guard.check_output(3.0, None)
    last = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert last.filename == str(PACKAGE / "guard.py")
    assert "raise TypeError(" in last.line


def test_everything_else_is_shared():
    for name in lightning_mtadam.__all__:
        home = lightning_mtadam.home_of(name)
        same = getattr(twin, name) is getattr(lightning_mtadam, name)
        assert same is (twin_of(home) == home), name
    assert twin.MTAdam is lightning_mtadam.MTAdam
    assert {*lightning_mtadam.__all__} <= {*dir(twin)}
    with pytest.raises(AttributeError, match="no attribute 'MTAdamW'"):
        twin.MTAdamW  # noqa: B018


def loaded_after(code):
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent).stdout
    return {name.split(".")[0] for name in found.split()}


def test_it_loads_no_lightning_before_it_is_used_and_then_one_of_the_two():
    packages = {"lightning", "pytorch_lightning"}
    assert not packages & loaded_after(f"import {HERE}")
    assert packages & loaded_after(f"import {HERE}.module, {HERE}.callbacks") == {"pytorch_lightning"}
    assert packages & loaded_after("import lightning_mtadam.module, lightning_mtadam.callbacks") == {"lightning"}


def test_without_the_package_it_says_what_to_install():
    code = f"sys.modules['pytorch_lightning'] = None\ntry:\n import {HERE}.module\nexcept ImportError as e: print(e)"
    found = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], check=True, capture_output=True, text=True)
    assert "which is not installed: pip install 'pytorch-lightning>=2.4'" in found.stdout


def test_bytecode_of_the_file_is_neither_read_nor_written():
    """It holds the imports of the other package."""
    loader = importlib.import_module(f"{HERE}.guard").__loader__
    assert isinstance(loader, TwinLoader)
    assert "pytorch_lightning.strategies" in _imported(loader.get_code(f"{HERE}.guard"))
    assert importlib.import_module("lightning_mtadam.guard").DDPStrategy.__module__.startswith("lightning.")


def _imported(code):
    return code.co_names


LAWS = ["tests/callbacks", "tests/test_guard.py"]
LONGER = ["tests/module", "tests/trainer_matrix"]
LEFT_OUT = "compile or ranks or two_optimizers_on_one_graph or user_logs or no_loss or batch_size_finder"
"""What takes long, and does not ask which package it is."""


@pytest.mark.parametrize("suite", [*LAWS, *(pytest.param(suite, marks=pytest.mark.slow) for suite in LONGER)])
def test_what_holds_for_one_package_holds_for_the_other(suite):
    options = ["-n", "0", "-p", "no:cacheprovider", "--assert=plain", "-p", "tests.pytorch_lightning.imports"]
    command = [sys.executable, "-m", "pytest", "-q", *options, "-k", f"not ({LEFT_OUT})", suite]
    found = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-20_000:] + found.stderr[-5_000:]
    assert " passed" in found.stdout


@QUIET
@pytest.mark.filterwarnings("ignore:.*litlogger", "ignore:Checkpoint directory", "ignore:Be aware that when using")
def test_a_checkpoint_of_one_package_goes_on_in_the_other(tmp_path):
    saved, whole, resumed = module("lightning.pytorch"), module("lightning.pytorch"), module("pytorch_lightning")
    first = trainer("lightning.pytorch")
    first.fit(saved, make_loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = trainer("pytorch_lightning", max_epochs=2)
    again.fit(resumed, make_loader(), ckpt_path=tmp_path / "last.ckpt")
    expected = trainer("lightning.pytorch", max_epochs=2)
    expected.fit(whole, make_loader())
    assert_same(whole.network, resumed.network)
    assert_same_state(expected.optimizers[0], again.optimizers[0])
    loaded = type(resumed).load_from_checkpoint(tmp_path / "last.ckpt")
    assert_same(loaded.network, saved.network)
