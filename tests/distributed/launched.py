"""A script whose Trainer starts the second rank by itself: ``python -m tests.distributed.launched FOLDER CASE``."""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from tests.distributed.training import STEPS
from tests.lightning_models import BATCH_SIZE, Regression, make_loader, make_trainer

RANKS = 2
DATA = make_loader(RANKS * STEPS).dataset


class Launched(Regression):
    """In the case "error", rank 1 fails in its third batch."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case

    def training_step(self, batch, batch_idx):
        if self.case == "error" and self.global_rank == 1 and batch_idx == 2:
            raise OSError("the disk is full")
        return super().training_step(batch, batch_idx)


def main() -> None:
    folder, case = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    trainer = make_trainer(max_epochs=1, strategy="ddp", devices=RANKS, use_distributed_sampler=False)
    sampler = DistributedSampler(DATA, RANKS, trainer.global_rank, shuffle=False)
    module = Launched(case)
    trainer.fit(module, DataLoader(DATA, BATCH_SIZE, sampler=sampler))
    torch.save(list(module.parameters()), folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
