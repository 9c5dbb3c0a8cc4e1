"""Train pix2pix on pairs of images with several methods, and print a table.

The generator's terms are the mean absolute error and the GAN loss, prescribed 100:1; unbalanced they are 1:1. Without
--data-dir the images are generated facades. --direction BtoA is from labels to photos for facades, from maps to aerial
photos for maps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from example_projects.common import image_command
from example_projects.common.image_data import ImageData
from example_projects.common.image_project import ImageProject
from example_projects.common.methods import Method
from example_projects.pix2pix.data import make_data
from example_projects.pix2pix.module import Pix2Pix

LAMBDAS = {"unbalanced": {"l1": 1.0, "gan": 1.0}, "balanced": {"l1": 100.0, "gan": 1.0}}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only pix2pix has."""
    parser.add_argument("--direction", choices=("AtoB", "BtoA"), default="BtoA", help="A is the left half of a file")


def data_of(options: argparse.Namespace, seed: int) -> ImageData:
    """The data that the options ask for."""
    return make_data(
        options.data_dir,
        size=options.image_size,
        direction=options.direction,
        batch_size=options.batch_size,
        seed=seed,
        workers=options.num_workers,
    )


def module_of(options: argparse.Namespace, method: Method, lambdas: Mapping[str, float], lr: float) -> Pix2Pix:
    """The module that the options ask for."""
    return Pix2Pix(method, lambdas, lr, epochs=options.max_epochs, size=options.image_size, width=options.width)


PROJECT = ImageProject(
    name="pix2pix",
    description=__doc__,
    lambdas=LAMBDAS,
    columns=("L1", "L2", "NMSE", "PSNR", "SSIM", "FID", "FD-VGG16"),
    defaults={"lr": [2e-4], "batch_size": 1, "max_epochs": 200, "image_size": 256, "width": 64},
    make_data=data_of,
    make_module=module_of,
    add_options=add_options,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    image_command.main(PROJECT, arguments)


if __name__ == "__main__":
    main()
