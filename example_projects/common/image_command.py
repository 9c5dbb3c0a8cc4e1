"""The command of every image project: its options, its runs one after the other, and its table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Adam

from example_projects.common.command import at_least, keep_quiet, positive, rate, write_tables
from example_projects.common.image_metrics import DISTANCES, FEATURE_EXTRACTORS
from example_projects.common.image_project import ImageProject, Job, train
from example_projects.common.methods import IMAGE_METHODS, Method
from example_projects.common.runs import Result

HYPERBAND = "hyperband"


class Parser(argparse.ArgumentParser):
    """Unless --search-metric is given, the search is by the first Frechet distance that is measured, as in the paper.

    Where there is none it is by the first column.
    """

    columns: Sequence[str] = ()

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Parse, and fill in the metric."""
        found, rest = super().parse_known_args(*args, **options)
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
    add("--method", nargs="+", choices=methods, default=["mtadam", "adam", "balanced-adam"], metavar="METHOD",
        help="one or several of: " + ", ".join(methods))  # fmt: skip
    add("--setting", choices=settings, default="unbalanced",
        help="lambdas of the losses: the paper's unbalanced ones, or those that the original prescribes;"
        " balanced-adam always has the latter")  # fmt: skip
    add("--anchor", default="first", metavar="TERM", help="of MTAdam: the loss that others are brought to")
    add("--seeds", nargs="+", type=int, default=[0], help="one run per method, learning rate and seed")
    add("--lr", nargs="+", type=rate, metavar="LR", help="learning rates, one run each")
    add("--trials", type=positive, default=40, help="of hyperband: how many lambdas it tries")
    add("--search-metric", metavar="METRIC",
        help="of hyperband: what it judges by; if left out, the Frechet distance, or the first column")  # fmt: skip


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
    add = parser.add_argument_group("running").add_argument
    add("--output-dir", type=Path, help="where logs, checkpoints, samples and tables go")
    add("--resume", action="store_true", help="continue an interrupted command: skip the runs that have ended")
    add("--checkpoint-every", type=positive, default=500, metavar="BATCHES", help="batches between checkpoints")
    add("--log-every", type=positive, default=10, metavar="STEPS", help="between values of losses and of the balance")
    add("--accelerator", default="auto", help="as for Lightning's Trainer")
    add("--devices", default="auto", help="as for Lightning's Trainer")
    add("--strategy", default="auto", help="as for Lightning's Trainer")
    add("--precision", default="32-true", help="as for Lightning's Trainer")
    add("--no-progress-bar", dest="progress_bar", action="store_false", help="print one line per run only")


def jobs_of(project: ImageProject, options: argparse.Namespace) -> Iterator[Job]:
    """The runs that the options ask for; of "hyperband" after its search, of which there is one per learning rate.

    Raises:
        ValueError: "hyperband" is asked for, and several processes; raised before any run, as the other.
        ImportError: "hyperband" is asked for without Optuna.
    """
    if HYPERBAND in options.method:
        check_search(options)
    found: dict[float, dict[str, float]] = {}
    for seed in options.seeds:
        for lr in options.lr:
            for name in options.method:
                if name == HYPERBAND:
                    found[lr] = found.get(lr) or _search(project, options, lr)
                    yield Job(name, Method(Adam), found[lr], lr, seed)
                else:
                    method = IMAGE_METHODS[name].anchored(options.anchor)
                    setting = prescribed(project, options.setting) if method.balanced else options.setting
                    yield Job(name, method, project.lambdas[setting], lr, seed)


def prescribed(project: ImageProject, setting: str) -> str:
    """The setting with the weights that a setting has unbalanced."""
    balanced = setting.replace("unbalanced", "balanced")
    return balanced if balanced in project.lambdas else "balanced"


def check_search(options: argparse.Namespace) -> None:
    """Raise unless the lambdas can be searched for.

    Raises:
        ValueError: several processes are asked for.
        ImportError: Optuna is not there.
    """
    one = options.devices == "1" or (options.devices == "auto" and torch.cuda.device_count() < 2)
    if options.strategy != "auto" or not one:
        raise ValueError("hyperband searches in one process: give --devices 1, without --strategy.")
    if find_spec("optuna") is None:
        raise ImportError("hyperband needs Optuna: pip install 'lightning_mtadam[search]'.")


def _search(project: ImageProject, options: argparse.Namespace, lr: float) -> dict[str, float]:
    from example_projects.common.hyperband import search

    print(f"hyperband: {options.trials} trials, lr {lr:g}", flush=True)
    return search(project, options, lr)


def reservation(options: argparse.Namespace) -> str:
    """What the reader of a table must know; empty if there is nothing."""
    if HYPERBAND not in options.method:
        return ""
    return (
        f"The lambdas of {HYPERBAND} are the best of {options.trials} trials by {options.search_metric} on the hold-out"
        " set, the same that is measured here: that favours it against the other methods."
    )


def train_all(project: ImageProject, options: argparse.Namespace) -> list[Result]:
    """Run what the options ask for, one after the other, and return the results, after those of the references."""
    say = rank_zero_only(print)
    say(project.make_data(options, options.seeds[0]).announcement)
    results = list(project.references(options))
    for job in jobs_of(project, options):
        weights = ", ".join(f"{factor:g} {term}" for term, factor in job.lambdas.items())
        say(f"{job.name}, seed {job.seed}, lr {job.lr:g}, {weights}", flush=True)
        label = job.name if len(options.lr) == 1 else f"{job.name}, lr {job.lr:g}"
        folder = str(job.folder(options).relative_to(options.output_dir))
        results.append(
            {"method": label, "lr": job.lr, "seed": job.seed, "folder": folder, **train(project, options, job)}
        )
    return results


def columns_of(project: ImageProject, results: Sequence[Result]) -> list[str]:
    """The project's columns that were measured, by set if there are several, the number of images, and the time."""
    wanted = [*project.columns, "n", "seconds_per_step"]
    found = list(dict.fromkeys(name for result in results for name in result))
    return [name for column in wanted for name in found if name == column or name.endswith(f" {column}")]


def print_table(options: argparse.Namespace, table: str, files: str) -> None:
    """Print a table, what its reader must know, and the files that were written."""
    parts = [table, reservation(options), f"Written to {options.output_dir}: {files}."]
    print("\n" + "\n\n".join(part for part in parts if part))


def main(project: ImageProject, arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parser_of(project).parse_args(arguments)
    keep_quiet()
    write(project, options, train_all(project, options))


@rank_zero_only
def write(project: ImageProject, options: argparse.Namespace, results: list[Result]) -> None:
    """Print the table and write it as Markdown and CSV, with the runs it summarises."""
    table = write_tables(options, results, columns_of(project, results))
    print_table(options, table, "table.md, table.csv; every run in results.csv")
    print(f"See samples, curves and the balance with: tensorboard --logdir {options.output_dir}")
