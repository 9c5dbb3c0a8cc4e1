"""What ``lightning_mtadam`` offers, for modules and trainers of the package ``pytorch_lightning``.

``MultiTermLightningModule`` is a ``pytorch_lightning.LightningModule`` here, and ``callbacks`` are callbacks of its
trainers, from the same source. What needs no Lightning, as the optimizer and balancers, is the same as in
``lightning_mtadam``.

Example:
    >>> import lightning_mtadam.pytorch_lightning as twin
    >>> twin.MultiTermLightningModule.__mro__[2].__module__
    'pytorch_lightning.core.module'
    >>> twin.MTAdam is lightning_mtadam.MTAdam
    True
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

import lightning_mtadam
from lightning_mtadam.pytorch_lightning.twins import TwinFinder, twin_of

if TYPE_CHECKING:
    from lightning_mtadam import *  # noqa: F403

__all__: list[str] = []
__all__ += lightning_mtadam.__all__

sys.meta_path.insert(0, TwinFinder())  # before who would find callbacks as they are


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(twin_of(lightning_mtadam.home_of(name))), name)


def callbacks_of_trainers() -> list[object]:
    """What ``pytorch_lightning`` adds to the callbacks of each trainer, as the entry point asks it to."""
    return lightning_mtadam.callbacks_of_trainers(__name__)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
