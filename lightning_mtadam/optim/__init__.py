"""The optimizer: plain PyTorch, usable without Lightning."""

from lightning_mtadam.optim.mtadam import MTAdam

__all__ = ["MTAdam"]
