"""How time and memory grow: ``python -m tests.benchmarks.scaling``; ``--plot docs/images/scaling.png`` draws it.

A multilayer perceptron with a small batch is trained by MTAdam, with I terms and |theta| parameters.

- Against I, in units of plain Adam's step on the sum, taken in turn, and of the parameters' size.
- Against |theta|, in units of what the first size of the list takes. Below some 1e6 parameters the step takes what it
  takes to start its operations, and what fits the cache is quicker: the line is fitted to all sizes all the same.

Straight lines are fitted by least squares, to relative errors: each point counts alike, whatever its size.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from tests.benchmarks.measuring import Piece, interleave, parse, parser, show, thread_counts, versions
from tests.benchmarks.methods import METHODS
from tests.benchmarks.networks import mlp_task, size_of
from tests.benchmarks.peak import in_a_process, peak_of

METHOD, BASE = "MTAdam", "Adam on the sum"


@dataclass(frozen=True)
class Line:
    """``value = start + slope x``, and how much of the variance it explains."""

    start: float
    slope: float
    r_squared: float

    def __str__(self) -> str:
        return f"{self.start:.3g} + {self.slope:.3g} x, R^2 = {self.r_squared:.4f}"


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """The straight line of least squares, each point weighted by the inverse square of its value.

    Example:
        >>> str(fit([1, 2, 4], [5, 7, 11]))
        '3 + 2 x, R^2 = 1.0000'
    """
    columns, values = torch.tensor([[1, one] for one in x], dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    weights = 1 / values
    solution = torch.linalg.lstsq(columns * weights[:, None], (values * weights)[:, None]).solution[:, 0]
    mean = (values * weights**2).sum() / (weights**2).sum()
    errors, spread = (((values - other) * weights).square().sum() for other in (columns @ solution, mean))
    return Line(float(solution[0]), float(solution[1]), float(1 - errors / spread))


@dataclass(frozen=True)
class Point:
    """What was measured at one I and |theta|: seconds of a step, of Adam's step, and bytes."""

    terms: int
    parameters: int
    seconds: float
    adam_seconds: float
    peak: int


def measure(terms: int, parameters: float, repeats: int) -> Point:
    """Time and memory."""
    torch.manual_seed(0)
    tasks = {method: mlp_task(terms, parameters) for method in (METHOD, BASE)}
    times = interleave({method: Piece(METHODS[method].make(task)) for method, task in tasks.items()}, repeats)
    size = size_of(tasks[METHOD].network)
    medians = [statistics.median(times[method]) for method in (METHOD, BASE)]
    del tasks
    return Point(terms, size, *medians, in_a_process(peak_bytes, terms, parameters))


def peak_bytes(terms: int, parameters: float) -> int:
    """The peak beyond the parameters."""
    return peak_of(lambda: METHODS[METHOD].make(mlp_task(terms, parameters)))


def against_terms(points: Sequence[Point]) -> list[Line]:
    """Print a table, and return the lines: time in Adam's steps, memory in |theta|."""
    terms = [point.terms for point in points]
    times = [point.seconds / point.adam_seconds for point in points]
    peaks = [point.peak / point.parameters / 4 for point in points]
    rows = [
        {"I": one, "step / Adam's": f"{time:.2f}", "peak, in \\|theta\\|": f"{peak:.2f}"}
        for one, time, peak in zip(terms, times, peaks, strict=True)
    ]
    lines = [fit(terms, times), fit(terms, peaks)]
    rows.append({"I": "line", "step / Adam's": str(lines[0]), "peak, in \\|theta\\|": str(lines[1])})
    show(f"Against I; {points[0].parameters:.3g} parameters", rows)
    return lines


def against_parameters(points: Sequence[Point]) -> list[Line]:
    """Print a table, and return the lines: time and memory in those of the first size, by millions of parameters."""
    millions = [point.parameters / 1e6 for point in points]
    times = [point.seconds / points[0].seconds for point in points]
    peaks = [point.peak / points[0].peak for point in points]
    rows = [
        {
            "millions of parameters": f"{one:.3g}",
            "step / the first": f"{time:.1f}",
            "peak / the first": f"{peak:.1f}",
            "step / Adam's": f"{point.seconds / point.adam_seconds:.2f}",
            "peak, in \\|theta\\|": f"{point.peak / point.parameters / 4:.2f}",
        }
        for point, one, time, peak in zip(points, millions, times, peaks, strict=True)
    ]
    lines = [fit(millions, times), fit(millions, peaks)]
    fitted = {"millions of parameters": "line", "step / the first": lines[0], "peak / the first": lines[1]}
    rows.append({**dict.fromkeys(rows[0], ""), **{key: str(value) for key, value in fitted.items()}})
    show(f"Against |theta|; I = {points[0].terms}", rows)
    return lines


def plot(by_terms: Sequence[Point], by_size: Sequence[Point], lines: Sequence[Line], file: Path) -> None:
    """Two panels: what grows with I, and with |theta|; dots measured, lines fitted."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = {
        left: (
            [point.terms for point in by_terms],
            [point.seconds / point.adam_seconds for point in by_terms],
            [point.peak / point.parameters / 4 for point in by_terms],
            ("step / Adam's step on the sum", "peak memory / parameters"),
        ),
        right: (
            [point.parameters / 1e6 for point in by_size],
            [point.seconds / by_size[0].seconds for point in by_size],
            [point.peak / by_size[0].peak for point in by_size],
            ("step / that of the smallest", "peak memory / that of the smallest"),
        ),
    }
    for index, (axes, (x, times, peaks, labels)) in enumerate(panels.items()):
        for values, line, label, colour in zip(
            (times, peaks), lines[2 * index :], labels, ("tab:blue", "tab:red"), strict=False
        ):
            axes.plot(x, values, "o", color=colour, label=label)
            axes.plot(x, [line.start + line.slope * one for one in x], "-", color=colour, linewidth=1)
        axes.legend()
        axes.grid(alpha=0.3)
    left.set(xlabel="terms I", title=f"{by_terms[0].parameters / 1e6:.2g} M parameters", ylim=0)
    right.set(xlabel="millions of parameters", title=f"{by_size[0].terms} terms", xscale="log", yscale="log")
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parser(__doc__, repeats=15)
    options.set_defaults(threads=[1])
    options.add_argument("--terms", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    options.add_argument("--parameters", type=float, nargs="+", default=[1e5, 3e5, 1e6, 3e6, 1e7, 5e7])
    options.add_argument("--fixed-terms", type=int, default=4, help="while |theta| varies")
    options.add_argument("--fixed-parameters", type=float, default=1e6, help="while I varies")
    options.add_argument("--plot", type=Path, help="a PNG file")
    chosen = parse(options, arguments)
    print(versions())
    for threads in thread_counts(chosen):
        print(f"{threads} thread(s), n = {chosen.repeats}; the peak with one")
        by_terms = [measure(terms, chosen.fixed_parameters, chosen.repeats) for terms in chosen.terms]
        by_size = [measure(chosen.fixed_terms, parameters, chosen.repeats) for parameters in chosen.parameters]
        lines = against_terms(by_terms) + against_parameters(by_size)
    if chosen.plot is not None:
        plot(by_terms, by_size, lines, chosen.plot)


if __name__ == "__main__":
    main()
