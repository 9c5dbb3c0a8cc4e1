"""Keeps sentences with a colon whole.

Napoleon takes what stands before a colon for a type: in a section "Returns", and in the first line of a property. In
this package annotations give the types, and docstrings are sentences. So these colons are hidden from Napoleon.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

COLON = re.compile(r"(?<!:):(?=\s|$)")
HIDDEN = "\ue000"


def hidden(lines: list[str], what: str) -> list[str]:
    """The lines of a docstring, without the colons that are no more than punctuation.

    Example:
        >>> lines = ["Sum:", "", "Returns:", "    Two: a.", "", "Raises:"]
        >>> [line.replace(HIDDEN, "-") for line in hidden(lines, "method")]
        ['Sum:', '', 'Returns:', '    Two- a.', '', 'Raises:']
    """
    found, returns = [], False
    for index, line in enumerate(lines):
        heading = not line.startswith(" ") and bool(line)
        first = index == 0 and what in ("attribute", "property")
        found.append(COLON.sub(HIDDEN, line) if first or (returns and not heading) else line)
        returns = line in ("Returns:", "Yields:") if heading else returns
    return found


def hide(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Before Napoleon."""
    lines[:] = hidden(lines, what)


def show(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """After Napoleon."""
    lines[:] = [line.replace(HIDDEN, ":") for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", hide, priority=100)
    app.connect("autodoc-process-docstring", show, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
