"""The private attribute of Lightning Fabric that the package relies on; nothing is imported for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_fabric_backward() -> Iterator[None]:
    """Count as ``fabric.backward``: under mixed precision the modules of Fabric refuse any other backward pass.

    Beside that it would scale the loss, which is the caller's to do, and nothing else.
    """
    wrappers = sys.modules.get("lightning.fabric.wrappers")
    if wrappers is None:
        yield
        return
    before = wrappers._in_fabric_backward
    wrappers._in_fabric_backward = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        wrappers._in_fabric_backward = before  # type: ignore[attr-defined]
