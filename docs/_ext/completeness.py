"""What the reference must say of every public name, or the build fails.

============  =======================================================================================================
of            must be there
============  =======================================================================================================
all           a docstring
parameters    a line in "Args" (or "Attributes"), or, in methods, their name in double backquotes
errors        a section "Raises", or an error's name, where it raises or calls what is named after checking or refusing
classes and   a section "Example"; pytest runs those with ``>>>``
functions
tensors       a shape in square brackets, or the word "scalar" or "shape", for parameters and results that are tensors
============  =======================================================================================================

What overrides a method of torch or Lightning need not repeat what they say of its parameters.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

from docs._ext.reference import PACKAGE, Public, public_names

LOGGER = logging.getLogger(__name__)
SECTION = re.compile(r"^(\w+):\n((?:[ ]+.*\n|\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^    (\*{0,2}\w+)(?: \(.*?\))?: ((?:.*\n)(?:     +.*\n|\n)*)", re.MULTILINE)
SHAPE = re.compile(r"\[[^\]]*\]|\bscalar|\bshape", re.IGNORECASE)
CHECKS = re.compile(r"^_*(check|refuse|require|non_finite)")


@dataclass(frozen=True)
class Docs:
    """A docstring in its parts.

    Attributes:
        text: all of it.
        sections: by their names.
    """

    text: str
    sections: dict[str, str]

    @classmethod
    def of(cls, obj: object) -> Docs:
        """The docstring of an object itself, not of what it overrides."""
        text = inspect.cleandoc(getattr(obj, "__doc__", None) or "") + "\n"
        return cls(text, dict(SECTION.findall(text)))

    def entries(self) -> dict[str, str]:
        """What is said of each parameter or attribute.

        Example:
            >>> list(Docs.of(Docs).entries())
            ['text', 'sections']
        """
        found = self.sections.get("Args", "") + self.sections.get("Attributes", "")
        return {name.lstrip("*"): text for name, text in ENTRY.findall(found)}


def raises(function: Callable[..., Any]) -> bool:
    """Whether a function has a ``raise`` of its own, or calls what checks or refuses.

    Example:
        >>> raises(textwrap.dedent), raises(lambda: None)
        (False, False)
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    nodes = list(ast.walk(tree))
    called = [getattr(node.func, "attr", getattr(node.func, "id", "")) for node in nodes if isinstance(node, ast.Call)]
    return any(isinstance(node, ast.Raise) and node.exc for node in nodes) or any(map(CHECKS.match, called))


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a caller gives by name."""
    found = inspect.signature(function).parameters.items()
    packed = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return {name: one for name, one in found if name != "self" and one.kind not in packed}


def holds_tensors(annotation: object) -> bool:
    """Whether an annotation speaks of tensors, which have shapes, and not of functions or modules.

    Example:
        >>> holds_tensors("dict[str, Tensor]"), holds_tensors("Callable[[Tensor], Tensor]"), holds_tensors("float")
        (True, False, False)
    """
    return bool(re.search(r"\bTensor\b", str(annotation))) and not re.search("Callable|list|Iterable", str(annotation))


def of_parameters(function: Callable[..., Any], docs: Docs, *, loosely: bool) -> Iterator[str]:
    """What is missing of the parameters."""
    entries = docs.entries()
    for name, parameter in parameters(function).items():
        mentioned = loosely and re.search(rf"``[^`]*\b{name}\b[^`]*``", docs.text)
        if name not in entries and not mentioned:
            yield f"says nothing of the parameter {name!r}: add it to Args"
        elif holds_tensors(parameter.annotation) and not SHAPE.search(entries.get(name, docs.text)):
            yield f"says nothing of the shape of {name!r}: add it in square brackets, or 'scalar'"


def of_function(function: Callable[..., Any], docs: Docs, *, loosely: bool = False) -> Iterator[str]:
    """What is missing of a function."""
    if not docs.text.strip():
        yield "has no docstring"
        return
    yield from of_parameters(function, docs, loosely=loosely)
    if raises(function) and not re.search(r"^Raises:|``\w+Error``", docs.text, re.MULTILINE):
        yield "says nothing of the errors that it raises: add a section Raises"
    if holds_tensors(inspect.signature(function).return_annotation) and not SHAPE.search(docs.text):
        yield "says nothing of the shape of what it returns: add it in square brackets, or 'scalar'"


def _is_internal(base: type, public: set[type]) -> bool:
    return base not in public and base.__module__.startswith(PACKAGE)


def own_members(cls: type, public: set[type]) -> dict[str, Callable[..., Any]]:
    """The methods and properties of a class that no class outside, and no other public one, has: they are new here."""
    homes = [base for base in cls.__mro__ if base is cls or _is_internal(base, public)]
    others = [base for base in cls.__mro__ if base not in homes]
    found: dict[str, Callable[..., Any]] = {}
    for base in reversed(homes):  # a method is explained where it is first defined
        for name, value in vars(base).items():
            plain = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            new = not name.startswith("_") and not any(hasattr(other, name) for other in others)
            if inspect.isfunction(plain) and new and plain.__module__.startswith(PACKAGE):
                found.setdefault(name, plain)
    return found


def of_class(cls: type, public: set[type]) -> Iterator[str]:
    """What is missing of a class and its members."""
    docs = Docs.of(cls)
    init = vars(cls).get("__init__")
    if is_dataclass(cls):
        yield from of_parameters(cls, docs, loosely=False)
    elif inspect.isfunction(init) and init.__module__.startswith(PACKAGE):
        yield from of_function(init, docs)
    for name, method in own_members(cls, public).items():
        yield from (f"{name}() {finding}" for finding in of_function(method, Docs.of(method), loosely=True))


def missing(one: Public, public: set[type]) -> list[str]:
    """What the docstring of a public name does not say, as sentences.

    Args:
        one: the name, with what it stands for.
        public: all public classes. What is inherited from one of them is looked at there.
    """
    docs = Docs.of(one.value)
    if not docs.text.strip():
        return [f"{one.full} has no docstring."]
    value: Any = one.value
    found = [*(of_class(value, public) if inspect.isclass(value) else of_function(value, docs))]
    if "Example" not in docs.sections:
        found.append("has no section Example")
    return [f"{one.full} {finding}." for finding in found]


def all_missing() -> list[str]:
    """What is missing of all public names."""
    names = public_names()
    public = {one.value for one in names if isinstance(one.value, type)}
    return [finding for one in names for finding in missing(one, public)]


def warn(app: Sphinx) -> None:
    """Before pages are read: warn of all that is missing, which ``sphinx-build -W`` takes for an error."""
    for finding in all_missing():
        LOGGER.warning(finding, type="completeness")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", warn)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
