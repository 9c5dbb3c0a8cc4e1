"""Loads the modules that know Lightning a second time, from the same files, for the package ``pytorch_lightning``.

Lightning comes as two packages, ``lightning`` and ``pytorch_lightning``: the same code under two names, so that a class
of one is none of the other. ``lightning_mtadam.pytorch_lightning.module`` is ``lightning_mtadam/module.py`` with other
imports, and so is each of :data:`ROOMS`. All other modules are shared. The imports are replaced in the syntax tree:
files and line numbers stay, so that tracebacks and ``inspect.getsource`` show the source.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

PACKAGE, HERE = "lightning_mtadam", "lightning_mtadam.pytorch_lightning"

ROOMS = ("lightning_internals", "roots", "guard", "module", "callbacks", "diagnosis")
"""What knows Lightning."""

NAMES = {
    "lightning.pytorch": "pytorch_lightning",
    "lightning.fabric": "lightning_fabric",
    **{f"{PACKAGE}.{room}": f"{HERE}.{room}" for room in ROOMS},
}
"""What is imported, by what the source says."""


def twin_of(name: str) -> str:
    """The name under which a module is imported here.

    Example:
        >>> twin_of("lightning.pytorch.callbacks")
        'pytorch_lightning.callbacks'
        >>> twin_of("lightning_mtadam.module"), twin_of("lightning_mtadam.optim")
        ('lightning_mtadam.pytorch_lightning.module', 'lightning_mtadam.optim')
    """
    for one, other in NAMES.items():
        if name == one or name.startswith(f"{one}."):
            return other + name.removeprefix(one)
    return name


class TwinImports(ast.NodeTransformer):
    """Replaces what is imported in a syntax tree.

    Example:
        >>> def rewritten(source):
        ...     print(ast.unparse(TwinImports().visit(ast.parse(source))))
        >>> rewritten("import lightning.pytorch as pl")
        import pytorch_lightning as pl
        >>> rewritten("from lightning_mtadam import balancers, guard")
        from lightning_mtadam import balancers
        from lightning_mtadam.pytorch_lightning import guard
    """

    here: tuple[str, ...] = ROOMS
    """What is imported from this package instead of the one above."""

    def visit_Import(self, node: ast.Import) -> ast.Import:
        """``import a.b as c``."""
        for alias in node.names:
            alias.name = twin_of(alias.name)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | list[ast.ImportFrom]:
        """``from a.b import c``, where ``c`` may be a module."""
        if node.module != PACKAGE:
            node.module = twin_of(node.module or "")
            return node
        twins = [alias for alias in node.names if alias.name in self.here]
        shared = [alias for alias in node.names if alias.name not in self.here]
        found = [ast.ImportFrom(home, names, 0) for home, names in ((PACKAGE, shared), (HERE, twins)) if names]
        return [ast.copy_location(one, node) for one in found]


class TwinLoader(SourceFileLoader):
    """Compiles a module with other imports; never from a ``.pyc``, which holds what the source says."""

    imports: type[TwinImports] = TwinImports

    def get_code(self, fullname: str) -> CodeType:
        """What ``source_to_code`` makes of the file."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def source_to_code(self, data: Any, path: Any, *, _optimization: int = -1) -> CodeType:  # type: ignore[override]
        """Compile the source, its imports replaced."""
        tree = self.imports().visit(ast.parse(data, path))
        code: CodeType = compile(tree, path, "exec", dont_inherit=True, optimize=_optimization)
        return code


class TwinFinder(MetaPathFinder):
    """Finds the twins of :data:`ROOMS` in the files of the package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The file of the module that ``fullname`` is the twin of, with the loader of twins.

        Raises:
            ModuleNotFoundError: ``pytorch_lightning`` is not installed.
        """
        if not fullname.startswith(f"{HERE}."):
            return None
        room, *below = fullname.removeprefix(f"{HERE}.").split(".")
        if room not in ROOMS:
            return None
        _check_installed()
        found = PathFinder.find_spec(fullname, path if below else _locations())
        if found is not None and found.origin is not None:
            found.loader, found.cached = TwinLoader(fullname, found.origin), None
        return found


def _locations() -> list[str]:
    package = find_spec(PACKAGE)
    return list(package.submodule_search_locations or ()) if package else []


def _check_installed() -> None:
    if find_spec("pytorch_lightning") is None:
        raise ModuleNotFoundError(
            f"{HERE} is for trainers of the package pytorch_lightning, which is not installed: pip install"
            " 'pytorch-lightning>=2.4'. For trainers of lightning.pytorch, import from lightning_mtadam."
        )
