"""The problems by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from example_projects.evidence.problems.autoencoder import autoencoder
from example_projects.evidence.problems.burgers import burgers
from example_projects.evidence.problems.digits import digits, mnist
from example_projects.evidence.problems.equation import equation
from example_projects.evidence.problems.gradnorm_toy import gradnorm_toy
from example_projects.evidence.problems.problem import Problem
from example_projects.evidence.problems.tox21 import tox21
from example_projects.evidence.problems.toy2d import toy2d
from example_projects.evidence.problems.vae import vae
from example_projects.mnist.data import SUBSET

# Each takes the folder with all data sets.
PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "toy2d": lambda folder: toy2d(),
    "gradnorm_toy": lambda folder: gradnorm_toy(),
    "vae": lambda folder: vae(mnist_in(folder)),
    "autoencoder": lambda folder: autoencoder(mnist_in(folder)),
    "equation": lambda folder: equation(),
    "digits": lambda folder: digits(mnist_in(folder)),
    "tox21": tox21,
    "burgers": burgers,
    "mnist": lambda folder: mnist(mnist_in(folder)),
}


def mnist_in(folder: Path) -> Path:
    """Where MNIST's files are: ``mnist`` in the folder, or else the subset that ships with the mnist project."""
    return folder / "mnist" if (folder / "mnist").is_dir() else SUBSET
