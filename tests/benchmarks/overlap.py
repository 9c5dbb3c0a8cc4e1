"""How much of the communication hides behind the backward passes: ``python -m tests.benchmarks.overlap``.

Two gloo ranks of one thread each train an MLP on four terms. Each all-reduce is made to take as long as one term's
backward pass, times --ratio. Reported is the time of a step with the overlap over that without it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from tests.distributed.ranks import results, run_ranks
from tests.distributed.slow_link import backward_seconds, seconds_per_step

WIDTH, DEPTH, BATCH, TERMS = 768, 4, 512, 4


def make_losses(model: nn.Module) -> dict[str, torch.Tensor]:
    """Four terms of one output."""
    output = model(torch.ones(BATCH, WIDTH))
    return {f"term{power}": output.abs().pow(power).mean() for power in range(1, TERMS + 1)}


def measure(rank: int, ratio: float, repeats: int) -> dict[str, float]:
    """One rank's part."""
    torch.manual_seed(0)
    network = nn.Sequential(*[layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
    size = 4 * sum(parameter.numel() for parameter in network.parameters())
    backward = backward_seconds(network, make_losses, repeats)
    slowest = torch.tensor(backward)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    return seconds_per_step(network, make_losses, ratio * float(slowest) / size, repeats)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="communication / backward")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {TERMS} terms, 2 gloo ranks of one thread, n = {options.repeats}, medians")
    print("\n| communication / backward | step with overlap / without | predicted |\n| --- | --- | --- |")
    for ratio in options.ratio:
        with tempfile.TemporaryDirectory() as folder:
            ranks = results(run_ranks(measure, Path(folder), ratio, options.repeats, timeout=600))
        measured = max(rank["overlap"] / rank["no overlap"] for rank in ranks)
        predicted = (1 + (TERMS - 1) * max(1, ratio) + ratio) / (TERMS * (1 + ratio))
        print(f"| {ratio:g} | {measured:.2f} | {predicted:.2f} |")


if __name__ == "__main__":
    main()
