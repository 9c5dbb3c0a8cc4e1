"""Callbacks that show the balance of the terms, or change it."""

from lightning_mtadam.callbacks.balance_weights import BalanceWeightMonitor
from lightning_mtadam.callbacks.gradient_report import GradientReport, report_losses
from lightning_mtadam.callbacks.importance_scheduler import ImportanceScheduler

__all__ = ["BalanceWeightMonitor", "GradientReport", "ImportanceScheduler", "report_losses"]
