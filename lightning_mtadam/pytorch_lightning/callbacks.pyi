"""For type checkers, which see the classes of ``lightning.pytorch`` here."""

from lightning_mtadam.callbacks import *  # noqa: F403
