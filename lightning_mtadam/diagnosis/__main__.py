"""``python -m lightning_mtadam.diagnosis --config config.yaml``."""

from lightning_mtadam.diagnosis.cli import DiagnosisCLI

if __name__ == "__main__":
    DiagnosisCLI()
