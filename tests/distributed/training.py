"""Trains a case on ranks, under the Trainer, and in the one process that they are held to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_mtadam import MTAdam, MultiTermLightningModule
from tests.distributed.cases import Case, Losses
from tests.distributed.ranks import results, run_ranks
from tests.lightning_models import Batch, fit, make_loader, make_mtadam, three_losses
from tests.loops import hand_loop

STEPS = 20
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}


class Trained(MultiTermLightningModule):
    """What a rank trains."""

    log_terms = False  # half the time of a batch this small

    def __init__(self, case: Case, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.case, self.rank = case, rank
        self.network = case.network(dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Losses:
        return self.case.losses(self.network, batch, batch_idx, self.rank)

    def configure_optimizers(self) -> MTAdam:
        return make_mtadam(self.network, **self.case.optimizer)


def rounds(ranks: int, count: int, dtype: torch.dtype) -> list[list[Batch]]:
    """The batches of all ranks, ``count`` times."""
    batches = iter(make_loader(ranks * count, dtype))
    return [list(islice(batches, ranks)) for _ in range(count)]


def fit_rank(module: MultiTermLightningModule, rank: int, batches: Sequence[Sequence[Batch]], **options: Any) -> Any:
    """Train a rank on its share of the batches, in the processes that ``run_ranks`` has started."""
    strategy = DDPStrategy(process_group_backend="gloo", **options.pop("strategy", {}))
    loader = DataLoader([parts[rank] for parts in batches], batch_size=None)
    devices = len(batches[0])
    options = {"max_epochs": 1, "use_distributed_sampler": False, "devices": devices, "strategy": strategy, **options}
    return fit(module, loader, **options)


def batch_count(case: Case) -> int:
    """Enough for ``STEPS`` steps, the last of which has a batch less."""
    return STEPS * case.accumulate - (case.accumulate > 1)


def train_together(rank: int, case: Case, ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    """Train under the Trainer: one of the ranks.

    Returns:
        What is compared: parameters, the optimizer's state and gradient norms, and the number of steps.
    """
    module = Trained(case, rank, dtype)
    trainer = fit_rank(module, rank, rounds(ranks, batch_count(case), dtype), strategy=case.strategy, **case.trainer)
    return {**summary(module.network, trainer.optimizers[0]), "steps": trainer.global_step}


def in_both_precisions(rank: int, case: Case, ranks: int) -> list[dict[str, Any]]:
    return [train_together(rank, case, ranks, dtype) for dtype in ROUNDING]


def assert_ranks_equal_one_process(case: Case, ranks: int, folder: Path) -> None:
    """The ranks are alike bit for bit, and equal the one process but for rounding; in both precisions."""
    together = results(run_ranks(in_both_precisions, folder, case, ranks, ranks=ranks))
    for dtype, (first, *others) in zip(ROUNDING, zip(*together, strict=True), strict=True):
        assert first["steps"] == STEPS
        assert all(same_summary(first, other) for other in others)
        alone = train_alone(case, ranks, dtype)
        assert largest(first["parameters"], alone["parameters"]) < ROUNDING[dtype]
        assert largest(first["norms"], alone["norms"], relative=True) < ROUNDING[dtype]
        assert largest(first["averages"], alone["averages"], relative=True) < ROUNDING[dtype]


def train_alone(case: Case, ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    """One process without Lightning, on what all ranks see."""

    def losses(network: nn.Module, batch: tuple[int, list[Batch]]) -> Losses:
        step, parts = batch
        if case.joined:
            return case.losses(network, join(parts), step, 0)
        of_ranks = [case.losses(network, part, step, rank) for rank, part in enumerate(parts)]
        return {name: torch.stack([found[name].to(dtype) for found in of_ranks]).mean() for name in of_ranks[0]}

    network = (case.alone or case.network)(dtype)
    optimizer = make_mtadam(network, **case.optimizer)
    batches = list(enumerate(rounds(ranks, batch_count(case), dtype)))
    hand_loop(network, optimizer, batches, epochs=1, accumulate=case.accumulate, clip=case.clip, losses=losses)
    return summary(network, optimizer)


class Wrapped(DistributedDataParallel):
    """Lets the losses look at a layer."""

    def __getitem__(self, index: int) -> nn.Module:
        return self.module[index]


def ddp_loop(model: nn.Module, optimizer: MTAdam, batches: Iterable[Batch], accumulate: int = 1) -> None:
    """What a user writes around DistributedDataParallel, without Lightning."""
    for index, batch in enumerate(batches):
        last = (index + 1) % accumulate == 0
        with nullcontext() if last else model.no_sync():
            losses = three_losses(model, batch)
            optimizer.backward({name: loss / accumulate for name, loss in losses.items()}, model=model)
        if last:
            optimizer.step()
            optimizer.zero_grad()


def joined_rounds(ranks: int, count: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """The same as ``rounds``, joined."""
    return [join(parts) for parts in rounds(ranks, count, dtype)]


def assert_equal_to_alone(ranks: Iterable[Sequence[Tensor]], alone: MultiTermLightningModule, count: int) -> None:
    """Fail unless two ranks' parameters, after so many batches each, are the same and those of one process."""
    first, second = ranks
    fit(alone, DataLoader(joined_rounds(2, count, torch.float64), batch_size=None), max_epochs=1)
    assert all_equal(first, second)
    assert largest(first, [parameter.detach() for parameter in alone.parameters()]) < 1e-6


def join(parts: Sequence[Batch]) -> list[Tensor]:
    """One batch of the ranks' batches."""
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def summary(network: nn.Module, optimizer: MTAdam) -> dict[str, Any]:
    return {
        "parameters": [parameter.detach() for parameter in network.parameters()],
        "state": [
            optimizer.state[parameter][key]
            for parameter in network.parameters()
            for key in sorted(optimizer.state[parameter])
        ],
        "norms": list(optimizer.gradient_norms().values()),
        "averages": [weights.nan_to_num() for weights in optimizer.average_weights().values()],
        "clocks": [state["step"] for state in optimizer.state.values() if state],
    }


def same_summary(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two ranks have the same parameters and optimizer state, bit for bit."""
    return all(all_equal(first[key], second[key]) for key in ("parameters", "state"))


def all_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def largest(first: Sequence[Tensor], second: Sequence[Tensor], *, relative: bool = False) -> float:
    """The largest difference between two lists of tensors; nan counts as one."""
    return max(_differences(first, second, relative))


def _differences(first: Sequence[Tensor], second: Sequence[Tensor], relative: bool) -> Iterator[float]:
    for a, b in zip(first, second, strict=True):
        by = b.abs().clamp(min=1e-30) if relative else 1
        yield float(((a - b) / by).abs().nan_to_num(nan=torch.inf).max())
