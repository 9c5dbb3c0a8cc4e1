"""The options of every image project."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from example_projects.common.command import add_time_limit
from example_projects.common.image_metrics import DISTANCES, FEATURE_EXTRACTORS
from example_projects.common.image_project import ImageProject
from example_projects.common.methods import IMAGE_METHODS
from example_projects.common.values import Distinct, at_least, devices, positive, rate, seed

HYPERBAND = "hyperband"


class Parser(argparse.ArgumentParser):
    """Unless --search-metric is given, the search is by the first Frechet distance that is measured, as in the paper.

    Where there is none it is by the first column.
    """

    columns: Sequence[str] = ()

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Parse, and fill in the metric; ``metric_given`` says whether it was given."""
        found, rest = super().parse_known_args(*args, **options)
        found.metric_given = found.search_metric is not None
        if found.search_metric is None:
            label = DISTANCES.get(found.feature_extractor, self.columns[0])
            found.search_metric = next((name for name in self.columns if name.startswith(label)), self.columns[0])
        return found, rest


def parser_of(project: ImageProject) -> argparse.ArgumentParser:
    """The options of all projects and the project's own."""
    parser = Parser(
        f"python -m example_projects.{project.name}",
        description=project.description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_what_is_compared(parser, list(project.lambdas))
    _add_data_and_networks(parser)
    _add_measuring(parser)
    _add_running(parser)
    project.add_options(parser)
    parser.columns = project.columns
    parser.set_defaults(output_dir=Path("runs") / project.name, **project.defaults)
    return parser


def _add_what_is_compared(parser: argparse.ArgumentParser, settings: Sequence[str]) -> None:
    methods = [*IMAGE_METHODS, HYPERBAND]
    add = parser.add_argument_group("what is compared").add_argument
    add("--method", nargs="+", action=Distinct, choices=methods, default=["mtadam", "adam", "balanced-adam"],
        metavar="METHOD", help="one or several of: " + ", ".join(methods))  # fmt: skip
    add("--setting", choices=settings, default="unbalanced",
        help="lambdas of the losses: the paper's unbalanced ones, or those that the original prescribes;"
        " balanced-adam always has the latter")  # fmt: skip
    add("--anchor", default="first", metavar="TERM", help="of MTAdam: the loss that others are brought to")
    add("--seeds", nargs="+", action=Distinct, type=seed, default=[0],
        help="one run per method, learning rate and seed")  # fmt: skip
    add("--lr", nargs="+", action=Distinct, type=rate, metavar="LR",
        help="learning rates, one run each; with --validation all of them are for the first seed, and the others are"
        " trained with the best")  # fmt: skip
    add("--trials", type=positive, default=40, help="of hyperband: how many lambdas it tries")
    add("--search-metric", metavar="METRIC",
        help="by which hyperband and --validation choose; if left out, a distance or the first column")  # fmt: skip


def _add_data_and_networks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data and networks").add_argument
    add("--data-dir", type=Path, default=None, help="folder with the images; if left out, images are generated")
    add("--validation", type=at_least(0), default=0, metavar="IMAGES",
        help="training images that are held back, to be measured while training in place of the test set")  # fmt: skip
    add("--image-size", type=positive, metavar="PIXELS", help="height and width that networks are trained on")
    add("--width", type=positive, metavar="CHANNELS", help="of the networks' first layers; others are multiples of it")
    add("--batch-size", type=positive, metavar="IMAGES", help="of each process")
    add("--max-epochs", type=positive, metavar="EPOCHS", help="epochs of training")
    add("--limit-train-batches", type=positive, default=None, metavar="BATCHES", help="of an epoch; all if left out")
    add("--num-workers", type=at_least(0), default=0, metavar="PROCESSES", help="that load training images")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is measured").add_argument
    add("--metrics-every", type=positive, default=1, metavar="EPOCHS", help="between two looks at the hold-out set")
    add("--limit-test-batches", type=positive, default=None, metavar="BATCHES", help="of the hold-out set; or all")
    add("--samples", type=positive, default=4, metavar="IMAGES", help="of the hold-out set that are shown")
    add("--feature-extractor", choices=FEATURE_EXTRACTORS, default="none",
        help="network for a Frechet distance: pytorch-fid's (FID) or VGG16 (FD-VGG16)")  # fmt: skip
    add("--weights", type=Path, default=None, help="file with that network's weights")


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--output-dir", type=Path, help="where logs, checkpoints, samples and tables go")
    add("--resume", action="store_true", help="continue an interrupted command: skip the runs that have ended")
    add_time_limit(group)
    add("--parallel", type=positive, default=1, metavar="RUNS", help="that are trained at the same time on one device")
    add("--checkpoint-every", type=positive, default=500, metavar="BATCHES", help="batches between checkpoints")
    add("--log-every", type=positive, default=10, metavar="STEPS", help="between values of losses and of the balance")
    add("--accelerator", default="auto", help="as for Lightning's Trainer")
    add("--devices", type=devices, default="auto", help="as for Lightning's Trainer")
    add("--strategy", default="auto", help="as for Lightning's Trainer")
    add("--precision", default="32-true", help="as for Lightning's Trainer")
    add("--no-progress-bar", dest="progress_bar", action="store_false", help="print one line per run only")
