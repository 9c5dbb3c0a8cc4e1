"""Tox21: twelve kinds of toxicity of molecules, each measured for some of them: a term is absent where none is."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from example_projects.evidence.problems.problem import Part, Problem, seeded, shuffled_batches

FILE = "tox21/tox21.csv.gz"
BITS, RADIUS = 1024, 2  # of the fingerprints
WIDTH, BATCH = 128, 128
SPLIT_SEED = 0

Molecules = tuple[Tensor, Tensor]  # fingerprints [N, BITS] and labels [N, T], nan where not measured


class Net(nn.Module):
    """1024-128-128, with a linear head of twelve; dropout of one half."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(BITS, WIDTH), nn.ReLU(), nn.Dropout(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout()
        )
        self.heads = nn.Linear(WIDTH, tasks)

    def forward(self, fingerprints: Tensor) -> Tensor:
        """[N, BITS] to logits, [N, T]."""
        logits: Tensor = self.heads(self.trunk(fingerprints))
        return logits


def fingerprints(smiles: Sequence[str]) -> Tensor:
    """Morgan fingerprints, [N, BITS]; zeros for what RDKit cannot read.

    Raises:
        ImportError: RDKit is not installed.
    """
    try:
        from rdkit import Chem, RDLogger
        from rdkit.Chem import rdFingerprintGenerator
    except ImportError as error:
        raise ImportError("The fingerprints of Tox21's molecules need RDKit. Install it: pip install rdkit.") from error
    RDLogger.DisableLog("rdApp.*")
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    molecules = [Chem.MolFromSmiles(text) for text in smiles]
    empty = np.zeros(BITS, dtype=np.uint8)
    rows = [empty if molecule is None else generator.GetFingerprintAsNumPy(molecule) for molecule in molecules]
    return torch.from_numpy(np.stack(rows)).float()


def read_table(file: Path) -> tuple[tuple[str, ...], Tensor, list[str]]:
    """The names of the tasks, the labels [N, T], nan where not measured, and the molecules as SMILES."""
    with gzip.open(file, "rt", newline="") as opened:
        rows = list(csv.DictReader(opened))
    tasks = tuple(name for name in rows[0] if name not in ("mol_id", "smiles"))
    labels = torch.tensor([[float(row[name] or "nan") for name in tasks] for row in rows])
    return tasks, labels, [row["smiles"] for row in rows]


def losses(network: nn.Module, batch: Molecules, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The mean cross entropy of each task over the molecules for which it was measured, if there are any."""
    inputs, labels = batch
    logits, known = network(inputs), ~labels.isnan()
    entropies = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none") * known
    means = entropies.sum(0) / known.sum(0).clamp(min=1)
    return {name: mean for name, mean, some in zip(tasks, means, known.any(0).tolist(), strict=True) if some}


def auroc(scores: Tensor, labels: Tensor) -> float:
    """The share of pairs of a positive and a negative that are in the right order, ties counted half.

    Example:
        >>> auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
        0.75
    """
    positive, negative = scores[labels == 1].double(), scores[labels == 0].double().sort().values
    below = torch.searchsorted(negative, positive).double() + torch.searchsorted(negative, positive, right=True)
    return (below / 2).mean().item() / len(negative)


@torch.no_grad()
def measure(network: nn.Module, part: Molecules) -> dict[str, float]:
    """The area under the receiver's characteristic: the mean over the tasks, and the worst task's."""
    inputs, labels = part
    logits = network(inputs)
    areas = [auroc(logits[:, task], labels[:, task]) for task in range(labels.shape[1])]
    return {"auroc": sum(areas) / len(areas), "worst_auroc": min(areas)}


def tox21(folder: Path) -> Problem:
    """The problem. Failed: a mean area below 0.65, or a task that is worse than chance, 0.5.

    Eight tenths of the molecules, at random, are for training, a tenth each for validation and for the test.

    Args:
        folder: with ``tox21/tox21.csv.gz``, of DeepChem's repository.
    """
    tasks, labels, smiles = read_table(folder / FILE)
    inputs = fingerprints(smiles)
    order = torch.randperm(len(smiles), generator=torch.Generator().manual_seed(SPLIT_SEED))
    tenth = len(smiles) // 10
    rows: dict[str, Tensor] = {
        "validation": order[:tenth],
        "test": order[tenth : 2 * tenth],
        "train": order[2 * tenth :],
    }
    parts = {name: (inputs[chosen], labels[chosen]) for name, chosen in rows.items()}

    def measure_part(network: nn.Module, part: Part) -> dict[str, float]:
        return measure(network, parts[part])

    return Problem(
        name="tox21",
        make_network=partial(seeded, partial(Net, len(tasks))),
        batches=partial(shuffled_batches, parts["train"], BATCH),
        losses=partial(losses, tasks=tasks),
        terms=tasks,
        anchor="mean",
        shared="trunk.3",
        measure=measure_part,
        figure="auroc",
        higher_is_better=True,
        allowed={"auroc": (0.65, 1), "worst_auroc": (0.5, 1)},
        steps=500,
        lrs=(1e-4, 3e-2),
    )
