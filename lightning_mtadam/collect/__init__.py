"""What MTAdam and the balancers share: losses are checked, agreed on, differentiated, averaged and accumulated."""

from lightning_mtadam.collect.batch import Batch, as_losses, collect, hand_on

__all__ = ["Batch", "as_losses", "collect", "hand_on"]
