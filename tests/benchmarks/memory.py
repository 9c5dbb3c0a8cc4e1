"""What a step holds beyond the parameters: ``python -m tests.benchmarks.memory``.

Each method trains a multilayer perceptron in a process of its own, with a batch so small that activations are
negligible. Counted is the peak that the operating system reports, in units of the parameters: states, gradients and
all temporaries. Freed memory is made to return to the system at once (MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.benchmarks.measuring import parse, parser, show, versions
from tests.benchmarks.methods import METHODS
from tests.benchmarks.networks import mlp_task, size_of
from tests.benchmarks.peak import in_a_process, peak_of

DEFAULT, LOW_MEMORY, AUTHORS = "MTAdam", "MTAdam, low_memory", "authors' MTAdam"
COMPARED = ("Adam on the sum", DEFAULT, LOW_MEMORY, AUTHORS)


def units(method: str, terms: int, parameters: float) -> float:
    """The peak of a method, in bytes of the parameters."""
    torch.manual_seed(0)
    size = 4 * size_of(mlp_task(terms, parameters).network)
    return peak_of(lambda: METHODS[method].make(mlp_task(terms, parameters))) / size


def wanted(method: str, terms: int) -> str:
    """What the peak must not exceed."""
    limits = {DEFAULT: 2 * terms + 3, LOW_MEMORY: terms + 3}
    return f"{limits[method]}" if method in limits else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED))
    options.add_argument("--terms", type=int, default=6)
    options.add_argument("--parameters", type=float, default=7e6)
    chosen = parse(options, arguments)
    found = {method: in_a_process(units, method, chosen.terms, chosen.parameters) for method in chosen.methods}
    print(versions())
    rows = [
        {
            "method": method,
            "peak, in \\|theta\\|": f"{peak:.2f}",
            "at most": wanted(method, chosen.terms),
            "/ the authors'": f"{peak / found[AUTHORS]:.2f}" if AUTHORS in found else "",
        }
        for method, peak in found.items()
    ]
    show(f"I = {chosen.terms}, {chosen.parameters:.3g} parameters, one thread", rows)


if __name__ == "__main__":
    main()
