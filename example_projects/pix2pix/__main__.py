"""Train pix2pix on pairs of images with several methods, and print a table.

The generator's terms are the mean absolute error and the GAN loss, prescribed 100:1; unbalanced they are 1:1. Without
--data-dir the images are generated facades. --direction BtoA is from labels to photos for facades, from maps to aerial
photos for maps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from example_projects.common import image_command
from example_projects.common.command import run_command
from example_projects.common.image_data import ImageData
from example_projects.common.image_project import ImageProject, name_of_folder
from example_projects.common.methods import Method
from example_projects.common.paper import numbers
from example_projects.common.values import beta
from example_projects.pix2pix.data import make_data
from example_projects.pix2pix.module import Pix2Pix

LAMBDAS = {
    "balanced": {"l1": 100.0, "gan": 1.0},
    "unbalanced": {"l1": 1.0, "gan": 1.0},
    "unbalanced-100": {"l1": 100.0, "gan": 100.0},  # as in the paper: Adam feels its epsilon alone, SGD the factor
}
# A common factor changes Adam's steps by its epsilon, but SGD's in proportion.
SGD_OF_THE_PAPER = (
    "The paper's sgd has lambdas of 100 and 100, which make its steps 100 times as large as 1 and 1: its numbers are"
    " beside --setting unbalanced-100 alone."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only pix2pix has."""
    add = parser.add_argument_group("pix2pix").add_argument
    add("--direction", choices=("AtoB", "BtoA"), default="BtoA", help="A is the left half of a file")
    add("--beta1", type=beta, default=0.5, help="of the generator: the original has 0.5, the paper's text 0.9")


def data_of(options: argparse.Namespace, seed: int) -> ImageData:
    """The data that the options ask for."""
    return make_data(
        options.data_dir,
        size=options.image_size,
        direction=options.direction,
        batch_size=options.batch_size,
        seed=seed,
        workers=options.num_workers,
        validation=options.validation,
    )


def module_of(options: argparse.Namespace, method: Method, lambdas: Mapping[str, float], lr: float) -> Pix2Pix:
    """The module that the options ask for."""
    return Pix2Pix(
        method,
        lambdas,
        lr,
        epochs=options.max_epochs,
        size=options.image_size,
        width=options.width,
        beta1=options.beta1,
    )


def data_sets_of(options: argparse.Namespace) -> Sequence[str]:
    """The data set as the paper measures it: the mean square of its truths, L2 / NMSE, is that of photographs, A."""
    return name_of_folder(options) if options.direction == "BtoA" else []


PROJECT = ImageProject(
    name="pix2pix",
    description=__doc__,
    lambdas=LAMBDAS,
    columns=("L1", "L2", "NMSE", "PSNR", "SSIM", "FID", "FD-VGG16"),
    defaults={"lr": [2e-4], "batch_size": 1, "max_epochs": 200, "image_size": 256, "width": 64},
    make_data=data_of,
    make_module=module_of,
    add_options=add_options,
    paper=numbers((2, 5), ("facades", "maps")),
    data_sets=data_sets_of,
    not_the_papers={"unbalanced": (("sgd",), SGD_OF_THE_PAPER)},
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    image_command.main(PROJECT, arguments)


if __name__ == "__main__":
    run_command(main)
