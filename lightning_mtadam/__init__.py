"""MTAdam for PyTorch Lightning: return a dict of named losses, get a balanced step.

The names below are imported when they are first used, so that the optimizer works without Lightning.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_mtadam.callbacks.gradient_report import report_losses
    from lightning_mtadam.diagnosis import diagnose
    from lightning_mtadam.export import export_weights
    from lightning_mtadam.module import MultiTermLightningModule
    from lightning_mtadam.optim import MTAdam
    from lightning_mtadam.partition import partitioned_losses
    from lightning_mtadam.terms import NonFiniteError

__version__ = "0.2.0"
__all__ = [
    "MTAdam",
    "MultiTermLightningModule",
    "NonFiniteError",
    "diagnose",
    "export_weights",
    "partitioned_losses",
    "report_losses",
]

_HOMES = {
    "MTAdam": "lightning_mtadam.optim",
    "MultiTermLightningModule": "lightning_mtadam.module",
    "NonFiniteError": "lightning_mtadam.terms",
    "diagnose": "lightning_mtadam.diagnosis",
    "export_weights": "lightning_mtadam.export",
    "partitioned_losses": "lightning_mtadam.partition",
    "report_losses": "lightning_mtadam.callbacks.gradient_report",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def home_of(name: str) -> str:
    """The module that a public name comes from."""
    return _HOMES[name]


def callbacks_of_trainers(package: str = __name__) -> list[object]:
    """What Lightning adds to the callbacks of each trainer, as the entry point in ``pyproject.toml`` asks it to.

    A plain LightningModule calls nothing of this package, so that nothing else could tell that its
    ``configure_balancer`` is in vain. Where no balancer was imported there is nothing to add.

    Args:
        package: this one, or its twin for trainers of ``pytorch_lightning``.
    """
    if "lightning_mtadam.balancers" not in sys.modules:
        return []
    import_module(f"{package}.roots").explain_other_modules()
    return [import_module(f"{package}.guard").TrainerGuard()]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
