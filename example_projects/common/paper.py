"""The figures of the MTAdam paper's tables, to stand beside ours.

``paper.csv`` has all of them, a figure a line: its table, data set ("setting"), method, metric, value and, where the
paper gives one, spread. L2 is a mean square in 0..255; "-A" and "-B" are CycleGAN's translations of the images of A and
of B: the mean square of the truth, L2 / NMSE, is that of the other domain's images.

References:
    Malkiel and Wolf, MTAdam: Automatic Balancing of Multiple Training Loss Terms, EMNLP 2021.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from example_projects.common.methods import ablations

Numbers = dict[str, dict[str, float]]  # by method, and by metric or column


class Figure(NamedTuple):
    """A number in one of the paper's tables.

    Attributes:
        table: 1 to 5.
        setting: the data set.
        method: by its name here.
        metric: accuracy is in percent.
        value: the mean, if the paper has several runs.
        spread: their standard deviation, if the paper gives it.
    """

    table: int
    setting: str
    method: str
    metric: str
    value: float
    spread: float | None


@cache
def read_figures() -> tuple[Figure, ...]:
    """All figures of all tables.

    Example:
        >>> read_figures()[0]
        Figure(table=1, setting='mnist', method='sgd', metric='accuracy', value=85.4, spread=1.23)
    """
    with Path(__file__).with_name("paper.csv").open(newline="") as file:
        return tuple(
            Figure(
                int(row["table"]),
                row["setting"],
                name_of(row["method"]),
                row["metric"],
                float(row["value"]),
                float(row["spread"]) if row["spread"] else None,
            )
            for row in csv.DictReader(file)
        )


def name_of(method: str) -> str:
    """What a method of the paper is called here.

    Example:
        >>> name_of("iv"), name_of("adam")
        ('mtadam-iv-own-second-moment', 'adam')
    """
    return next((name for name in ablations() if name.split("-")[1] == method), method)


def numbers(tables: Sequence[int], data_sets: Sequence[str]) -> dict[str, Numbers]:
    """The values per data set and method, by metric; where several tables have one, that of the first.

    Example:
        >>> numbers((2, 5), ["facades"])["facades"]["mtadam"]
        {'L1': 46.5, 'L2': 3822.0, 'NMSE': 0.236, 'FID': 130.38}
    """
    found: dict[str, Numbers] = {data_set: {} for data_set in data_sets}
    for table in tables:
        for figure in read_figures():
            if figure.table == table and figure.setting in found:
                found[figure.setting].setdefault(figure.method, {}).setdefault(figure.metric, figure.value)
    return found
