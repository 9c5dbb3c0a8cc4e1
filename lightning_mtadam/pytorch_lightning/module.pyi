"""For type checkers, which see the classes of ``lightning.pytorch`` here."""

from lightning_mtadam.module import MultiTermLightningModule as MultiTermLightningModule
