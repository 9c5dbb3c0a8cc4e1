"""Enlarge photographs four times with SRGAN, trained with several methods, and print a table.

The generator has three losses: the mean squared error, the discriminator's verdict, and the distance of VGG features.
The first row of the table is bicubic interpolation, which learns nothing; with --pretrain-epochs the second is the
generator that all runs begin with.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from example_projects.common import image_command
from example_projects.common.command import run_command
from example_projects.common.image_data import ImageData
from example_projects.common.image_metrics import ImageMetrics, make_distance
from example_projects.common.image_module import ImageModule
from example_projects.common.image_project import ImageProject
from example_projects.common.methods import Method
from example_projects.common.paper import numbers
from example_projects.common.runs import Result
from example_projects.common.values import at_least, positive, rate
from example_projects.srgan.data import make_data
from example_projects.srgan.evaluation import EvaluationBySet, MetricsBySet
from example_projects.srgan.module import LAMBDAS, SRGAN, bicubic
from example_projects.srgan.networks import SCALE
from example_projects.srgan.perceptual import PerceptualLoss, make_perceptual_loss
from example_projects.srgan.pretraining import load_pretrained, pretrain


def add_options(parser: argparse.ArgumentParser) -> None:
    """SRGAN's own options."""
    add = parser.add_argument_group("SRGAN").add_argument
    add("--test-dir", nargs="+", type=Path, default=[],
        help="folders of photographs to test on, or of pairs *_HR.png and *_LR.png as in Set14; of several, each is"
        " measured by itself; go with --data-dir, a folder of photographs to train on")  # fmt: skip
    add("--perceptual-weights", type=Path, default=None, metavar="FILE",
        help="state dict with the convolutions of torchvision's VGG19 or VGG16, or 'random', for trials; if left out,"
        " torchvision's VGG19 is downloaded")  # fmt: skip
    add("--crops-per-image", type=positive, default=16, metavar="CROPS", help="of each training image in an epoch")
    add("--blocks", type=positive, default=16, help="residual blocks of the generator")
    add("--pretrain-epochs", type=at_least(0), default=0, metavar="EPOCHS",
        help="in which Adam trains the generator on the squared error alone, once for all runs")  # fmt: skip
    add("--pretrain-lr", type=rate, default=1e-4, metavar="LR", help="learning rate of these epochs")


@cache
def perceptual_loss(weights: Path | None, for_trial: bool) -> PerceptualLoss:
    """The loss, made and announced once for all runs."""
    loss, announcement = make_perceptual_loss(weights, for_trial=for_trial)
    rank_zero_only(print)(announcement)
    return loss


def data_of(options: argparse.Namespace, seed: int) -> ImageData:
    """The data that the options ask for."""
    return make_data(
        options.data_dir,
        options.test_dir,
        image_size=options.image_size,
        crops_per_image=options.crops_per_image,
        batch_size=options.batch_size,
        seed=seed,
        workers=options.num_workers,
        validation=options.validation,
    )


def module_of(options: argparse.Namespace, method: Method, lambdas: Mapping[str, float], lr: float) -> SRGAN:
    """The module that the options ask for."""
    return SRGAN(
        method,
        lambdas,
        lr,
        perceptual_loss(options.perceptual_weights, options.data_dir is None),
        epochs=options.max_epochs,
        image_size=options.image_size,
        width=options.width,
        blocks=options.blocks,
    )


def begin(module: ImageModule, options: argparse.Namespace) -> None:
    """Give a module the generator that was pretrained."""
    if options.pretrain_epochs:
        load_pretrained(module.get_submodule("generator"), options)


def metrics_of(options: argparse.Namespace) -> MetricsBySet:
    """The metrics of all projects, and those of the luma without a border, as super-resolution is measured."""

    def of_a_set() -> ImageMetrics:
        return ImageMetrics(make_distance(options.feature_extractor, options.weights), y_border=SCALE)

    names = data_sets_of(options)
    return MetricsBySet(of_a_set, names if len(names) > 1 else [], validated=options.validation > 0)


def references(options: argparse.Namespace) -> list[Result]:
    """What bicubic interpolation gives on the hold-out sets, and the generator before its rival comes in."""
    perceptual_loss(options.perceptual_weights, options.data_dir is None)  # if it cannot be had, say so before training
    metrics, data = metrics_of(options), data_of(options, seed=0)
    metrics.begin(data.test)
    sets = list(data.test.values()) if isinstance(data.test, Mapping) else [data.test]
    for place, images in enumerate(sets):
        for index in range(len(images))[: options.limit_test_batches]:
            low, high = images[index]
            metrics.update(bicubic(low[None]), high[None], place)
    rows = [{"method": "bicubic", **metrics.compute()}]
    return [*rows, pretrain(PROJECT, options)] if options.pretrain_epochs else rows


def data_sets_of(options: argparse.Namespace) -> Sequence[str]:
    """The data sets that are tested on."""
    return [folder.name for folder in options.test_dir]


PROJECT = ImageProject(
    name="srgan",
    description=__doc__,
    lambdas=LAMBDAS,
    columns=("PSNR-Y", "SSIM-Y", "PSNR", "SSIM", "L1", "L2", "NMSE", "FID", "FD-VGG16"),
    defaults={"lr": [1e-4], "image_size": 96, "width": 64, "batch_size": 16, "max_epochs": 100},
    make_data=data_of,
    make_module=module_of,
    begin=begin,
    make_metrics=metrics_of,
    evaluation=EvaluationBySet,
    add_options=add_options,
    references=references,
    paper=numbers((4,), ("set14", "bsd100")),
    paper_columns={"PSNR": "PSNR-Y", "SSIM": "SSIM-Y"},  # balanced Adam's are SRGAN's published ones, of the luma
    data_sets=data_sets_of,
    full_size={"max_epochs": 250, "pretrain_epochs": 1250},
    size_note="With 800 photographs, 1250 epochs of pretraining and 250 of training are the original's million and"
    " 200,000 steps.",
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    image_command.main(PROJECT, arguments)


if __name__ == "__main__":
    run_command(main)
