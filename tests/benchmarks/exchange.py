"""What it costs that the ranks agree once a step: ``python -m tests.benchmarks.exchange``.

Measured is one exchange among processes of this machine over gloo, of what every rank says alike, as in a training that
goes well. Modelled is one among machines: gloo passes the words on in a ring, in N - 1 messages.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from lightning_mtadam.distributed import agreement
from tests.distributed.ranks import results, run_ranks

LATENCY = 2e-5
"""Seconds of a message between machines."""


def announcement(parameters: int, terms: int) -> agreement.Announcement:
    """What a rank says of a step."""
    named = tuple((f"layer{index}.weight", (64, 64, 3, 3)) for index in range(parameters))
    names, reached = tuple(f"term{index}" for index in range(terms)), ((True,) * parameters,) * terms
    return agreement.Announcement(names, (), named, averages=True, done=True, reached=reached)


def exchanges(rank: int, parameters: int, terms: int, repeats: int) -> list[float]:
    """Seconds of each."""
    mine, found = announcement(parameters, terms), []
    for index in range(repeats + 20):
        again = replace(mine, options=(("step", str(index % 2)),))  # made anew, as in each step
        begin = time.perf_counter()
        agreement.hear(again, dist.group.WORLD)
        if index >= 20:
            found.append(time.perf_counter() - begin)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--parameters", type=int, default=62, help="tensors; 62 is a ResNet-18")
    parser.add_argument("--terms", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=300)
    given = parser.parse_args()
    print(f"{given.parameters} tensors, {given.terms} terms, n = {given.repeats}\n")
    print("| ranks | one exchange, median (quartiles) | |\n| --- | --- | --- |")
    for ranks in given.ranks:
        arguments = given.parameters, given.terms, given.repeats
        with tempfile.TemporaryDirectory() as folder:
            found = results(run_ranks(exchanges, Path(folder), *arguments, ranks=ranks, timeout=300))
        low, middle, high = (1e3 * value for value in statistics.quantiles(found[0], n=4))
        print(f"| {ranks} | {middle:.2f} ms ({low:.2f} to {high:.2f}) | measured, on one machine |")
    for ranks in (8, 64):
        print(f"| {ranks} | {1e3 * (ranks - 1) * LATENCY:.2f} ms | modelled, {1e6 * LATENCY:g} us a message |")


if __name__ == "__main__":
    main()
