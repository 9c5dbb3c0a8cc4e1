"""Links to the documentation of Python, torch and Lightning, where their lists of names can be had.

Sphinx warns of a list that it cannot fetch, and an offline build would fail. Here each list is fetched once, ahead. One
that cannot be had is left out. A name that no list has is let pass if the installed package has it: so a mistaken name
is an error with a network and without one.
"""

from __future__ import annotations

import builtins
import sys
from contextlib import suppress
from functools import reduce
from importlib import import_module
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.domains import Domain
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
FIRST_BYTES = b"# Sphinx inventory version"
KNOWN = {"lightning_mtadam", "torch", "lightning", "pytorch_lightning", "torchmetrics", "torchjd", "numpy"}
"""Packages whose names may be mentioned without a link, beside those of Python itself."""


def fetch(address: str, seconds: float) -> bytes | None:
    """The list of names at an address; ``None`` if it cannot be had, or is something else.

    Example:
        >>> fetch("file:///nowhere", 1)
    """
    try:
        with urlopen(f"{address}/objects.inv", timeout=seconds) as answer:
            found: bytes = answer.read()
    except (URLError, OSError, ValueError):
        return None
    return found if found.startswith(FIRST_BYTES) else None


def find(full_name: str) -> object:
    """What has this full name in Python or an installed package.

    Raises:
        LookupError: there is no such thing, or its package is not one of :data:`KNOWN`.

    Example:
        >>> find("torch.optim.optimizer.Optimizer").__name__
        'Optimizer'
    """
    parts = full_name.split(".")
    if len(parts) == 1 and hasattr(builtins, full_name):
        return getattr(builtins, full_name)
    if parts[0] in KNOWN or parts[0] in sys.stdlib_module_names:
        for cut in range(len(parts), 0, -1):
            with suppress(ImportError, AttributeError):
                return reduce(getattr, parts[cut:], import_module(".".join(parts[:cut])))
    raise LookupError(f"There is no {full_name}.")


def exists(full_name: str) -> bool:
    """Whether :func:`find` finds it.

    Example:
        >>> exists("torch.Tensor"), exists("torch.Tenser"), exists("int"), exists("docutils.nodes")
        (True, False, True, False)
    """
    try:
        find(full_name)
    except LookupError:
        return False
    return True


def meanings(target: str, module: str | None, cls: str | None) -> list[str]:
    """What a name in a docstring may stand for: itself, or something of the public module, its class, or its files.

    Example:
        >>> meanings("lr", "lightning_mtadam.optim.mtadam", "MTAdam")
        ['lr', 'lightning_mtadam.optim.mtadam.lr', 'lightning_mtadam.optim.mtadam.MTAdam.lr']
    """
    if not module:
        return [target]
    files = sorted(name for name in sys.modules if name.startswith(f"{module}."))
    places = [module, *([f"{module}.{cls}"] if cls else []), *files]
    return [target, *(f"{place}.{target}" for place in places)]


def keep_what_is_there(app: Sphinx, config: Config) -> None:
    """Leave out of ``intersphinx_mapping`` what cannot be fetched, and keep the rest beside the build."""
    folder = Path(app.doctreedir)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, (address, _) in config.intersphinx_mapping.items():
        names = fetch(address, config.intersphinx_timeout)
        if names is None:
            LOGGER.info("No links to %s: its list of names cannot be had.", address)
            continue
        path = folder / f"{name}.inv"
        path.write_bytes(names)
        found[name] = (address, str(path))
    config.intersphinx_mapping = found


def let_pass(app: Sphinx, domain: Domain | None, node: nodes.Element) -> bool | None:
    """Whether a reference without a page is to a thing that exists. If not, Sphinx warns."""
    if domain is None or domain.name != "py":
        return None
    return any(map(exists, meanings(node["reftarget"], node.get("py:module"), node.get("py:class")))) or None


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", keep_what_is_there, priority=100)
    app.connect("warn-missing-reference", let_pass)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
