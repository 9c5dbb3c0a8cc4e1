"""Make the subset of MNIST that ships with the project: ``python -m example_projects.mnist.make_subset FOLDER``.

Takes 1,000 training and 200 test images of each class, in the order of the full set, from MNIST's four idx files in
FOLDER, and writes them as gzipped idx files, the same bytes each time.
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

from example_projects.common.command import run_command
from example_projects.mnist.data import FILES, SUBSET, find_file, read_idx

PER_CLASS = {"train": 1000, "test": 200}


def choose(labels: Tensor, per_class: int) -> Tensor:
    """The indices of the first ``per_class`` samples of every class, ascending."""
    chosen = [(labels == label).nonzero()[:per_class, 0] for label in labels.unique()]
    return torch.cat(chosen).sort().values


def write_idx(path: Path, values: Tensor) -> None:
    """Write bytes as a gzipped idx file."""
    header = b"\x00\x00\x08" + struct.pack(f">B{values.dim()}I", values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes(), mtime=0))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    SUBSET.mkdir(exist_ok=True)
    for split, names in FILES.items():
        images, labels = (read_idx(find_file(folder, name)) for name in names)
        chosen = choose(labels, PER_CLASS[split])
        for name, values in zip(names, (images, labels), strict=True):
            write_idx(SUBSET / f"{name}.gz", values[chosen])


if __name__ == "__main__":
    run_command(main)
