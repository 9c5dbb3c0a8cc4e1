"""What the benchmarks share: pieces of work timed in turn, their ratios, and the options of the commands."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from example_projects.common.report import Row, markdown

WARM_UP = 3
Work = Callable[[], object]


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Attributes:
        run: what is timed.
        prepare: what is done before each run, not timed.
        count: how often ``run`` does the work: its time is divided by that.
    """

    run: Work
    prepare: Work | None = None
    count: int = 1

    def seconds(self) -> float:
        """Do it once."""
        if self.prepare is not None:
            self.prepare()
        start = time.perf_counter()
        self.run()
        return (time.perf_counter() - start) / self.count


def interleave(pieces: Mapping[str, Piece], repeats: int) -> dict[str, list[float]]:
    """Time the pieces in turn, ``repeats`` times after a warm-up: what disturbs the machine disturbs them all."""
    times: dict[str, list[float]] = {name: [] for name in pieces}
    for round_ in range(WARM_UP + repeats):
        for name, piece in pieces.items():
            seconds = piece.seconds()
            if round_ >= WARM_UP:
                times[name].append(seconds)
    return times


@dataclass(frozen=True)
class Ratio:
    """The ratio of two medians, and the quartiles of the paired ratios."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Median over median of times that were taken in turn."""
    pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = pairs[len(pairs) // 4], pairs[3 * len(pairs) // 4]
    return Ratio(statistics.median(ours) / statistics.median(theirs), low, high)


def parser(purpose: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options of every command."""
    parser = argparse.ArgumentParser(description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="three repeats: to see that it runs")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and let ``--quick`` decide on the repeats."""
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats = 3
    return options


def versions(*more: str) -> str:
    """What the figures were taken with."""
    named = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", *more))
    return f"{named}, Python {platform.python_version()}, CPU ({torch.backends.cpu.get_cpu_capability()})"


def thread_counts(options: argparse.Namespace) -> Iterator[int]:
    """Run what follows with each number of threads in turn."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        torch.compiler.reset()  # kernels are compiled for a number of threads
        yield threads


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table for the docs."""
    print(f"\n{title}\n\n{markdown(rows)}", flush=True)
