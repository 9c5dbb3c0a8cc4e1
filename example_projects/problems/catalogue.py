"""The problems by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from example_projects.problems.autoencoder import autoencoder
from example_projects.problems.digits import digits
from example_projects.problems.equation import equation
from example_projects.problems.problem import Problem

# Each takes the folder with MNIST's four idx files.
PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "digits": digits,
    "equation": lambda folder: equation(),
    "autoencoder": autoencoder,
}
