"""What MTAdam and the balancers share: losses are checked, agreed on, differentiated, averaged and accumulated."""

from lightning_mtadam.collect.batch import Batch, collect

__all__ = ["Batch", "collect"]
