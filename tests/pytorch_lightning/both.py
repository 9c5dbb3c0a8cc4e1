"""The same training with each of the two packages that Lightning comes as."""

import lightning.pytorch as pl
import pytorch_lightning

import lightning_mtadam
import lightning_mtadam.pytorch_lightning as twin
from tests.lightning_models import make_mtadam, make_network, three_losses

PACKAGES = {"lightning.pytorch": (pl, lightning_mtadam), "pytorch_lightning": (pytorch_lightning, twin)}
"""By name the package, and what of this package goes with it."""


def trainer(package, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return PACKAGES[package][0].Trainer(accelerator="cpu", **{"max_epochs": 1, **quiet, **options})


def module(package):
    class Regression(PACKAGES[package][1].MultiTermLightningModule):
        def __init__(self):
            super().__init__()
            self.network = make_network()

        def training_step(self, batch, batch_idx):
            return three_losses(self.network, batch)

        def configure_optimizers(self):
            return make_mtadam(self.network)

    return Regression()


def other(package):
    return next(name for name in PACKAGES if name != package)
