"""Callbacks that show the balance of the terms."""

from lightning_mtadam.callbacks.balance_weights import BalanceWeightMonitor

__all__ = ["BalanceWeightMonitor"]
