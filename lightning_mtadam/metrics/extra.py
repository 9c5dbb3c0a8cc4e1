"""What the extra ``metrics`` installs, imported when it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(name: str) -> Any:
    """Import a module of the extra ``metrics``.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise ModuleNotFoundError(
            f"lightning_mtadam.metrics needs {package} here, which cannot be imported ({error}). Install it with"
            f" pip install {package}."
        ) from error
