"""Ways to train on several losses, side by side: ``python -m tests.benchmarks.rivals``.

A whole step (forward, backward passes, optimizer) in time and in peak memory, relative to plain Adam on the sum of the
same losses, on three networks. Times are ratios of medians, interleaved in one process; the peak beyond the parameters,
activations included, is the operating system's, of a process for each. A period of ``balance_every`` steps counts as
its mean. TorchJD is left out where it is not installed: ``pip install -e ".[benchmarks]"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from tests.benchmarks.measuring import Piece, interleave, parse, parser, ratio, show, thread_counts, versions
from tests.benchmarks.methods import METHODS, Step
from tests.benchmarks.networks import Task, mnist_task, resnet_task, unet_task
from tests.benchmarks.peak import in_a_process, peak_of

BASE = "Adam on the sum"
TASKS: dict[str, Callable[[], Task]] = {
    "MNIST, 10 terms": mnist_task,
    "ResNet-18, 3 terms": resnet_task,
    "U-Net, 2 terms": partial(unet_task, 2),
    "U-Net, 6 terms": partial(unet_task, 6),
}


def repeat(step: Step, count: int) -> Step:
    """A step, several times."""

    def run() -> None:
        for _ in range(count):
            step()

    return run


def piece(method: str, task: str) -> Piece:
    """What is timed."""
    torch.manual_seed(0)
    period = METHODS[method].period
    return Piece(repeat(METHODS[method].make(TASKS[task]()), period), count=period)


def peak(method: str, task: str) -> int:
    """The peak memory of a method on a task, in bytes."""
    torch.manual_seed(0)
    return peak_of(lambda: METHODS[method].make(TASKS[task]()), steps=METHODS[method].period + 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parser(__doc__, repeats=20)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options.add_argument("--no-memory", action="store_true", help="times only")
    chosen = parse(options, arguments)
    print(versions("torchvision"))
    for method in list(chosen.methods):
        if METHODS[method].missing:
            print(f"Left out: {method}, which needs {', '.join(METHODS[method].missing)}.")
            chosen.methods.remove(method)
    methods = list(dict.fromkeys([BASE, *chosen.methods]))
    for threads in thread_counts(chosen):
        columns = {}
        for task in chosen.tasks:
            times = interleave({method: piece(method, task) for method in methods}, chosen.repeats)
            columns[task] = {method: str(ratio(times[method], times[BASE])) for method in methods}
        rows = [{"step": method, **{task: columns[task][method] for task in chosen.tasks}} for method in methods]
        show(f"Step / Adam's step; {threads} thread(s), n = {chosen.repeats}; in brackets quartiles", rows)
    if not chosen.no_memory:
        peaks = {task: {method: in_a_process(peak, method, task) for method in methods} for task in chosen.tasks}
        rows = [
            {"peak": method, **{task: f"{peaks[task][method] / peaks[task][BASE]:.2f}" for task in chosen.tasks}}
            for method in methods
        ]
        show("Peak beyond the parameters / Adam's; one thread", rows)


if __name__ == "__main__":
    main()
