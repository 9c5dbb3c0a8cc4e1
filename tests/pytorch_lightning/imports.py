"""A plugin of pytest, ``-p tests.pytorch_lightning.imports``: tests are of ``pytorch_lightning``, from the same files.

It goes with ``--assert=plain``: pytest's own way to import tests would come first.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

import lightning_mtadam
from lightning_mtadam.pytorch_lightning.twins import HERE, NAMES, PACKAGE, ROOMS, TwinImports, TwinLoader


class TestImports(TwinImports):
    """What is public is imported from ``lightning_mtadam.pytorch_lightning``, and strings name what is there."""

    __test__ = False
    here = (*ROOMS, *lightning_mtadam.__all__)

    def visit_Import(self, node):  # noqa: N802
        super().visit_Import(node)
        for alias in node.names:
            if alias.name == PACKAGE:
                alias.name, alias.asname = HERE, alias.asname or PACKAGE
        return node

    def visit_Constant(self, node):  # noqa: N802
        if isinstance(node.value, str):
            for one, other in NAMES.items():
                node.value = node.value.replace(one, other)
        return node


class TestLoader(TwinLoader):
    __test__ = False
    imports = TestImports


class TestFinder(MetaPathFinder):
    __test__ = False

    def find_spec(self, fullname, path, target=None):
        if not fullname.startswith("tests.") or fullname.startswith("tests.pytorch_lightning"):
            return None
        found = PathFinder.find_spec(fullname, path)
        if found is not None and found.origin is not None and found.origin.endswith(".py"):
            found.loader, found.cached = TestLoader(fullname, found.origin), None
        return found


sys.meta_path.insert(0, TestFinder())
