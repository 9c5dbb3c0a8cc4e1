"""Run by ``test_ddp.py``: ``python -m tests.distributed.ddp_run OUTPUT CASE``. Two ranks, started as users do."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_mtadam import MTAdam, MultiTermLightningModule

RANKS, BATCH, BATCHES = 2, 4, 24
CASES = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.05},
    "changing": {"accumulate_grad_batches": 3},
    "own_terms": {},
    "bad_rank": {},
}


class Model(MultiTermLightningModule):
    def __init__(self, case="plain", rank=0):
        super().__init__()
        torch.manual_seed(0)
        self.case, self.rank = case, rank
        self.trunk, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self.head(self.trunk(x).tanh())
        losses = {"fit": (output - y).square().mean(), "trunk": 50 * self.trunk(x).abs().mean()}
        if self.case == "own_terms" and self.rank == 1:
            losses["third"] = output.mean()
        if self.case == "bad_rank" and self.rank == 1 and batch_idx == 3:
            losses["fit"] = output
        if self.case == "changing":  # other terms in every batch, in another order on rank 1
            present = (("fit", "trunk"), ("trunk",), ("fit",))[batch_idx % 3]
            losses = {name: losses[name] for name in (reversed(present) if self.rank else present)}
        return losses

    def configure_optimizers(self):
        return MTAdam(self.named_parameters(), lr=1e-2)


def dataset():
    generator = torch.Generator().manual_seed(1)
    size = RANKS * BATCH * BATCHES
    return TensorDataset(torch.randn(size, 5, generator=generator), torch.randn(size, 3, generator=generator))


def trainer(**options):
    return pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def main():
    output, case = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    run = trainer(strategy="ddp", devices=RANKS, use_distributed_sampler=False, **CASES[case])
    data = dataset()
    sampler = DistributedSampler(data, RANKS, run.global_rank, shuffle=False)
    model = Model(case, run.global_rank)
    run.fit(model, DataLoader(data, BATCH, sampler=sampler))
    state = {"weights": model.state_dict(), "optimizer": run.optimizers[0].state_dict()}
    torch.save(state, output / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main()
