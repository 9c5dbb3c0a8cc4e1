"""The house: what may import what, how long it is, and how far a batch travels in it."""

from __future__ import annotations

import ast
import gc
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_mtadam
from lightning_mtadam import MTAdam, MultiTermLightningModule
from lightning_mtadam.pytorch_lightning.twins import ROOMS
from tests.lightning_models import QUIET, make_trainer

PACKAGE = Path(lightning_mtadam.__file__).parent
ROOT = "lightning_mtadam"
FLOORS = (
    {
        *(
            "terms",
            "balancing",
            "checkpoint",
            "coupling",
            "graphs",
            "groups",
            "importance",
            "recomputed",
            "wrappers",
            "constants",
            "gradient_statistics",
            "finite",
            "layout",
            "layers",
            "meetings",
            "parameter_names",
            "schedule",
        ),
        "lightning_internals",
    },
    {"distributed"},
    {"collect", "extra_pass", "partition"},
    {"edits"},
    {"optim", "balancers"},
    {"export"},
    {
        *("balancer_slot", "roots", "guard", "module", "progress_bar", "callbacks", "metrics"),
        *("diagnosis", "pytorch_lightning", "__init__"),
    },
)
"""Rooms from below to above: a room imports from those below it, and from its own floor if there is no circle."""
KNOW_LIGHTNING = set(ROOMS)
FEW_LINES, FEW_LINES_A_FILE = 3200, 320
FEW_FILES, FEW_CALLS = 22, 230
"""Of a batch of two terms."""


def modules():
    """Name -> path of every module of the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path, known):
    """The package's modules that a file imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == ROOT:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return found


def graph():
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items() if name != ROOT}


def room(module):
    return module.split(".")[1] if "." in module else "__init__"


def floor(module):
    return next(level for level, rooms in enumerate(FLOORS) if room(module) in rooms)


def circles(edges):
    """The modules from which a way leads back to them."""

    def reach(module, seen):
        for following in edges.get(module, ()):
            if following not in seen:
                seen.add(following)
                reach(following, seen)
        return seen

    return {module for module in edges if module in reach(module, set())}


def test_no_module_imports_itself_by_way_of_others():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {"b", "c"}, "the test can fail"
    assert not circles(graph())


def test_every_import_leads_down_or_stays_on_its_floor():
    wrong = [(one, other) for one, found in graph().items() for other in found if floor(other) > floor(one)]
    assert not wrong


def test_rooms_of_one_floor_do_not_import_each_other_in_a_circle():
    rooms: dict[str, set[str]] = {}
    for one, found in graph().items():
        rooms.setdefault(room(one), set()).update(room(other) for other in found if room(other) != room(one))
    assert not circles(rooms)


def test_terms_imports_nothing_of_the_package():
    assert not graph()[f"{ROOT}.terms"]


def test_only_the_rooms_that_may_know_lightning_import_it():
    for name, path in modules().items():
        if name == ROOT or room(name) in KNOW_LIGHTNING:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {one.split(".")[0] for one in names} & {
                "lightning",
                "pytorch_lightning",
                "lightning_utilities",
            }, name


def lines(path):
    return path.read_text().count("\n")


def test_the_rooms_of_the_algorithm_stay_short():
    counted = [*PACKAGE.glob("optim/*.py"), *PACKAGE.glob("collect/*.py"), PACKAGE / "balancing.py"]
    assert sum(map(lines, counted)) <= FEW_LINES
    assert lines(PACKAGE / "optim" / "algorithm.py") <= 160


def test_no_file_is_long():
    long = {path.name: lines(path) for path in PACKAGE.rglob("*.py") if lines(path) > FEW_LINES_A_FILE}
    assert not long


def parameters_of(function):
    arguments = function.args
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)


def test_no_function_takes_many_parameters():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "__init__":
                own = node.args.args[:1] and node.args.args[0].arg in ("self", "cls")
                assert parameters_of(node) - bool(own) <= 8, f"{path.name}:{node.lineno} {node.name}"


@pytest.mark.parametrize("formula", ["addcdiv_", "lerp_(", ".sqrt("])
def test_the_update_is_written_in_one_place(formula):
    """Its formulas stand in algorithm.py alone; averages of scales, of norms and of roots are not it."""
    files = {path.name for path in PACKAGE.glob("optim/*.py") if formula in path.read_text()}
    assert files <= {"algorithm.py"}


def test_each_line_of_the_algorithm_is_tagged():
    text = (PACKAGE / "optim" / "algorithm.py").read_text() + (PACKAGE / "balancing.py").read_text()
    for number in (7, 8, 9, 10, 11, 12, 14):
        assert f"line {number}" in text or f" {number} and" in text or f"and {number}" in text or f", {number}" in text


class Classifier(MultiTermLightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 5))

    def training_step(self, batch, batch_idx):
        images, classes = batch
        output = self.network(images)
        return {"class": nn.functional.cross_entropy(output, classes), "size": output.square().mean()}

    def configure_optimizers(self):
        return MTAdam(self.named_parameters())


class Traveller:
    """Notes the package's functions that are called while it is entered; frames of comprehensions count, too."""

    def __init__(self):
        self.calls: Counter[str] = Counter()

    def _note(self, frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            self.calls[f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_code.co_name}"] += 1

    @property
    def files(self):
        return {name.rpartition(":")[0] for name in self.calls}


@contextmanager
def _no_garbage():
    """What other tests have left is collected before, as its finalizers would count."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@QUIET
def test_a_batch_passes_few_files_and_few_calls():
    traveller = Traveller()

    class Watched(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 5:
                sys.setprofile(traveller._note)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 5:
                sys.setprofile(None)

    data = TensorDataset(torch.randn(28, 64), torch.randint(0, 5, (28,)))
    with _no_garbage():
        make_trainer(max_epochs=1).fit(Watched(), DataLoader(data, batch_size=4))
    assert {"module.py", "optim/mtadam.py", "optim/algorithm.py"} <= traveller.files
    assert len(traveller.files) <= FEW_FILES
    assert sum(traveller.calls.values()) <= FEW_CALLS
