"""What the cost model of docs/distributed.md predicts: ``python -m tests.benchmarks.communication``.

Nothing is measured here. ``tests.benchmarks.overlap`` holds ``step_seconds`` to the clock.
"""

from __future__ import annotations

import argparse

LINKS = {"NVLink, 300 GB/s": 300e9, "InfiniBand, 50 GB/s": 50e9, "100 Gbit/s Ethernet, 12.5 GB/s": 12.5e9}


def all_reduce_seconds(size: float, ranks: int, bytes_per_second: float, latency: float = 2e-5) -> float:
    """A ring's time: every rank sends and receives ``2 (N - 1) / N`` of the bytes, in ``2 (N - 1)`` messages."""
    return 2 * (ranks - 1) * (size / ranks / bytes_per_second + latency)


def step_seconds(
    terms: int, backward: float, communication: float, *, rest: float = 0.0, overlap: bool = True
) -> float:
    """The time of a step under DDP.

    Args:
        terms: I.
        backward: seconds of one term's backward pass.
        communication: seconds of one term's all-reduce.
        rest: seconds of forward pass and optimizer.
        overlap: whether a term's gradients travel while the next term's backward pass runs; the last one's cannot.
    """
    if not overlap:
        return rest + terms * (backward + communication)
    return rest + backward + (terms - 1) * max(backward, communication) + communication


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=25.6e6, help="|theta|; 25.6e6 is a ResNet-50")
    parser.add_argument("--bytes", type=int, default=4, help="of a gradient's element")
    parser.add_argument("--backward", type=float, default=0.1, help="seconds of one term's backward pass")
    parser.add_argument("--forward", type=float, default=0.05, help="seconds of the forward pass")
    parser.add_argument("--terms", type=int, default=4)
    options = parser.parse_args()
    size = options.parameters * options.bytes
    print(
        f"|theta| = {options.parameters:g}, {options.terms} terms, backward {1000 * options.backward:g} ms a term,"
        f" forward {1000 * options.forward:g} ms\n"
    )
    print("| link | ranks | all-reduce of a term | step | communication in it | in it without overlap |")
    print("| --- | --- | --- | --- | --- | --- |")
    for link, speed in LINKS.items():
        for ranks in (8, 64):
            sending = all_reduce_seconds(size, ranks, speed)
            step = step_seconds(options.terms, options.backward, sending, rest=options.forward)
            plain = step_seconds(options.terms, options.backward, sending, rest=options.forward, overlap=False)
            alone = step_seconds(options.terms, options.backward, 0, rest=options.forward)
            print(
                f"| {link} | {ranks} | {1000 * sending:.1f} ms | {1000 * step:.0f} ms | {1 - alone / step:.0%} |"
                f" {1 - alone / plain:.0%} |"
            )


if __name__ == "__main__":
    main()
