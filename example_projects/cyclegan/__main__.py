"""Train CycleGAN on two sets of images with several methods, and print a table.

The generators' terms are the cycles, the GAN losses and the identities of both domains, prescribed 10:1:5; unbalanced
the cycles have 1000 (and the identities half of that; 5, as before, in "unbalanced-cycle"; 0.5, whatever the cycles
have, in the settings that end in "-text"). Without --data-dir the images are procedural textures. Both translations are
measured: "-A" is what is made of A's images, beside B's. Without a truth, as for horses and zebras, only a Frechet
distance measures them (--feature-extractor); cycle_* is the error of an image that went there and came back.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import islice

from torch.utils.data import DataLoader

from example_projects.common import image_command
from example_projects.common.command import run_command
from example_projects.common.image_data import ImageData
from example_projects.common.image_metrics import ImageMetrics
from example_projects.common.image_project import ImageProject, pixel_metrics
from example_projects.common.methods import Method
from example_projects.common.paper import numbers
from example_projects.common.runs import Result
from example_projects.common.values import at_least, beta, positive
from example_projects.cyclegan.data import has_truth, make_data
from example_projects.cyclegan.evaluation import RoundTripEvaluation, RoundTripMetrics
from example_projects.cyclegan.losses import DOMAINS, OTHER_READINGS, SETTINGS
from example_projects.cyclegan.module import CycleGAN
from example_projects.cyclegan.networks import check_size

PIXELS = ("L1", "L2", "NMSE", "PSNR", "SSIM")
COLUMNS = tuple(f"{name}-{side}" for side in DOMAINS for name in (*PIXELS, "FID", "FD-VGG16", "cycle_L1", "cycle_SSIM"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only CycleGAN has."""
    add = parser.add_argument_group("CycleGAN").add_argument
    add("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="which translation is shown")
    add("--blocks", type=positive, default=9, help="residual blocks of a generator")
    add("--pool-size", type=at_least(0), default=50, metavar="IMAGES", help="generated images that are kept")
    add("--beta1", type=beta, default=0.5, help="of the generators: the original has 0.5, the paper's text 0.9")
    add("--constant-lr", action="store_true", help="don't let the learning rates fall in the second half")


def data_of(options: argparse.Namespace, seed: int) -> ImageData:
    """The data that the options ask for."""
    check_size(options.image_size)
    return make_data(
        options.data_dir,
        size=options.image_size,
        direction=options.direction,
        batch_size=options.batch_size,
        seed=seed,
        workers=options.num_workers,
        validation=options.validation,
    )


def module_of(options: argparse.Namespace, method: Method, lambdas: Mapping[str, float], lr: float) -> CycleGAN:
    """The module that the options ask for."""
    return CycleGAN(
        method,
        lambdas,
        lr,
        epochs=None if options.constant_lr else options.max_epochs,
        width=options.width,
        blocks=options.blocks,
        pool_size=options.pool_size,
        beta1=options.beta1,
    )


def metrics_of(options: argparse.Namespace) -> RoundTripMetrics:
    """The metrics that the data allow."""
    shown, _, other = options.direction.partition("to")
    there = {side: pixel_metrics(options) for side in (shown, other)}
    return RoundTripMetrics(there, {side: ImageMetrics() for side in there}, truth=has_truth(options.data_dir))


def untranslated(options: argparse.Namespace) -> list[Result]:
    """What generators that change nothing would give: a row of the table that needs no training."""
    metrics = metrics_of(options)
    shown, other = metrics.there
    for here, there in islice(DataLoader(data_of(options, 0).test), options.limit_test_batches):
        metrics.update(here, there, shown)
        metrics.update_cycle(here, here, shown)
        metrics.update(there, here, other)
        metrics.update_cycle(there, there, other)
    return [{"method": "no translation", **metrics.compute()}]


PROJECT = ImageProject(
    name="cyclegan",
    description=__doc__,
    lambdas={**SETTINGS, **OTHER_READINGS},
    columns=COLUMNS,
    defaults={"lr": [2e-4], "batch_size": 1, "max_epochs": 200, "image_size": 256, "width": 64},
    make_data=data_of,
    make_module=module_of,
    make_metrics=metrics_of,
    evaluation=RoundTripEvaluation,
    add_options=add_options,
    references=untranslated,
    paper=numbers((3, 5), ("horse2zebra", "maps")),
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    image_command.main(PROJECT, arguments)


if __name__ == "__main__":
    run_command(main)
