"""The reference: a page for every public name, made from the ``__all__`` of every public module.

A module is public if it has an ``__all__``, but for those in :data:`INTERNAL`. A name of two modules has one page.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from docs._ext.outside import GENERATED, ROOT, write

PACKAGE = "lightning_mtadam"
INTERNAL = {"lightning_mtadam.collect"}
"""Modules with an ``__all__`` that is for the package itself."""


@dataclass(frozen=True)
class Public:
    """A public name.

    Attributes:
        module: the first module that offers it.
        name: as it is there.
        value: what it stands for.
    """

    module: str
    name: str
    value: object

    @property
    def full(self) -> str:
        """The name to import it by."""
        return f"{self.module}.{self.name}"


def public_modules() -> list[str]:
    """The names of the modules that have an ``__all__``, the package itself first. None is imported.

    Example:
        >>> public_modules()[:2]
        ['lightning_mtadam', 'lightning_mtadam.balancers']
    """
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        targets = [node.targets[0] for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            found.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    return sorted(set(found) - INTERNAL)


@cache
def public_names() -> list[Public]:
    """Every public name, once, with the first module that offers it."""
    found: dict[int, Public] = {}
    for module in public_modules():
        for name in import_module(module).__all__:
            value = getattr(import_module(module), name)
            found.setdefault(id(value), Public(module, name, value))
    return list(found.values())


def outer_bases(cls: type) -> list[str]:
    """The names of the bases that are not of this package: what they have is explained in their own documentation.

    Example:
        >>> outer_bases(type("Mine", (dict,), {"__module__": "lightning_mtadam"}))
        ['dict', 'object']
    """
    return [base.__name__ for base in cls.__mro__ if not base.__module__.startswith(PACKAGE)]


def page(one: Public) -> str:
    """The page of a public name."""
    lines = [f"# {one.name}", "", "```{eval-rst}", f".. currentmodule:: {one.module}"]
    if inspect.isclass(one.value):
        lines += [f".. autoclass:: {one.name}", "   :members:", "   :show-inheritance:"]
        lines += [f"   :inherited-members: {', '.join(outer_bases(one.value))}"]
        if is_dataclass(one.value):  # its docstring describes them
            lines += [f"   :exclude-members: {', '.join(field.name for field in fields(one.value))}"]
    else:
        lines += [f".. autofunction:: {one.name}"]
    return "\n".join([*lines, "```", ""])


def module_page(module: str, names: list[Public]) -> str:
    """The page of a module: what it is for, and its names with a line on each."""
    lines = [f"# {module}", "", "```{eval-rst}", f".. automodule:: {module}", "   :no-members:", "```", ""]
    own = {one.name: one for one in names if one.module == module}
    for name in sorted(import_module(module).__all__):
        value = getattr(import_module(module), name)
        home = own.get(name) or next(one for one in names if one.value is value)
        lines.append(f"- [{name}](../names/{home.full}.md): {first_line(value)}")
    listed = [f"{name} <../names/{own[name].full}>" for name in sorted(own)]
    lines += ["", "```{toctree}", ":hidden:", "", *listed, "```", ""]
    return "\n".join(lines)


def first_line(value: object) -> str:
    """The first line of a docstring, as Markdown."""
    line = (inspect.getdoc(value) or "").partition("\n")[0]
    return re.sub(r":\w+:`~?([^`]+)`", lambda match: f"`{match[1].rpartition('.')[2]}`", line.replace("``", "`"))


def write_reference(app: Sphinx) -> None:
    """Before pages are read: write those of the reference, and remove those of names that are gone."""
    names = public_names()
    written = {GENERATED / "names" / f"{one.full}.md": page(one) for one in names}
    written |= {GENERATED / "modules" / f"{module}.md": module_page(module, names) for module in public_modules()}
    for path, text in written.items():
        write(path, text)
    for path in [*GENERATED.glob("names/*.md"), *GENERATED.glob("modules/*.md")]:
        if path not in written:
            path.unlink()


def outer_or_public(app: Sphinx, name: str, obj: object, options: object, bases: list[type]) -> None:
    """The bases that are shown: public ones, and in place of the others what they are made of."""
    public = {id(one.value) for one in public_names()}

    def shown(base: type) -> list[type]:
        if id(base) in public or not base.__module__.startswith(PACKAGE):
            return [base]
        return [one for below in base.__bases__ for one in shown(below)]

    found = [one for base in bases for one in shown(base) if one is not object]
    bases[:] = dict.fromkeys(found) or [object]


def link_short_names(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """In docstrings: a public name without its module leads to its page, wherever it is mentioned."""
    found = [one.full for one in public_names() if one.name == node["reftarget"] and node.get("refdomain") == "py"]
    if len(found) != 1:
        return None
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, text)


def link_pages(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """In docstrings: ``docs/page.md`` becomes a link to that page."""
    folder = Path(app.srcdir)
    for index, line in enumerate(lines):
        lines[index] = re.sub(
            r"``docs/([\w/]+)\.md``",
            lambda match: f":doc:`/{match[1]}`" if (folder / f"{match[1]}.md").exists() else match[0],
            line,
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-process-bases", outer_or_public)
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("missing-reference", link_short_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
