"""Train for some steps, and say what the losses need: ``diagnose``."""

from lightning_mtadam.diagnosis.diagnosis import Diagnosis
from lightning_mtadam.diagnosis.trial import diagnose

__all__ = ["Diagnosis", "diagnose"]
