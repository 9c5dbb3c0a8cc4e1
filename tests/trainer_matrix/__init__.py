"""What the Trainer may be asked for, and what comes of it: the rows of the support table, docs/support.md."""

from importlib import import_module

import pytest

_GROUPS = (
    "gradients",
    "edits",
    "steps",
    "learning_rate",
    "averaging",
    "length",
    "checkpoints",
    "data",
    "evaluation",
    "diagnosis",
    "compiled",
    "precision",
    "cli",
)
_MODULES = [f"{__name__}.rows_{group}" for group in _GROUPS]

pytest.register_assert_rewrite(*_MODULES)
for _module in _MODULES:
    import_module(_module)
