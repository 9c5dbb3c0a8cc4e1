"""Every way in which ranks may train together: networks, losses, and options of the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.lightning_models import Batch, make_network, three_losses

Losses = dict[str, Tensor]


class Branches(nn.Module):
    """A trunk and two heads, of which a rank may use one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.trunk = nn.Linear(3, 4, dtype=dtype)
            self.heads = nn.ModuleList(nn.Linear(4, 2, dtype=dtype) for _ in range(2))


class SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, whose derivative is the sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SumOverRanks.forward(ctx, gradient)


class SyncedBatchNorm(nn.BatchNorm1d):
    """Normalises by the mean and variance over all ranks; torch's own SyncBatchNorm does not run on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        mean = SumOverRanks.apply(x.mean(0)) / dist.get_world_size()
        variance = SumOverRanks.apply((x - mean).square().mean(0)) / dist.get_world_size()
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


def make_normed(dtype: torch.dtype) -> nn.Sequential:
    """With a BatchNorm, and without the bias before it, whose gradient is zero but for rounding."""
    network = make_network(dtype, batch_norm=True)
    network[0].bias.requires_grad_(False)
    return network


def make_synced(dtype: torch.dtype) -> nn.Sequential:
    network = make_normed(dtype)
    network[1] = SyncedBatchNorm(network[1].num_features, dtype=dtype)
    return network


def make_frozen(dtype: torch.dtype) -> nn.Sequential:
    network = make_network(dtype)
    network[0].bias.requires_grad_(False)
    return network


def plain(network: nn.Module, batch: Batch, step: int, rank: int) -> Losses:
    return three_losses(network, batch)


def changing_terms(network: nn.Module, batch: Batch, step: int, rank: int) -> Losses:
    """Other terms in every batch; in another order on ranks above 0."""
    present = (("fit", "size", "decay"), ("size",), ("decay", "fit"))[step % 3]
    losses = three_losses(network, batch)
    return {name: losses[name] for name in (reversed(present) if rank else present)}


def late_term(network: nn.Module, batch: Batch, step: int, rank: int) -> Losses:
    """A term comes in the tenth step, which would be light without it."""
    losses = three_losses(network, batch)
    if step < 9:
        del losses["size"]
    return losses


def own_heads(network: Branches, batch: Batch, step: int, rank: int) -> Losses:
    """Each rank uses one of the heads, and the heads' decay is a term that reaches them on rank 0 only."""
    x, y = batch
    hidden = network.trunk(x).tanh()
    output = network.heads[(rank + step // 5) % 2](hidden)
    reached = network.heads if rank == 0 else network.trunk
    return {
        "fit": (output - y).square().mean(),
        "size": 300 * output.abs().mean(),
        "decay": torch.stack([p.square().sum() for p in reached.parameters()]).sum(),
    }


def constant_terms(network: nn.Module, batch: Batch, step: int, rank: int) -> Losses:
    """A term without graph on one rank: from the first step on, on every rank in turn, also all terms of a rank."""
    losses = three_losses(network, batch)
    if rank == 1:
        losses["size"] = torch.zeros(())
    if rank == 0 and step % 2:
        losses["fit"] = torch.tensor(0.0, dtype=losses["fit"].dtype)
    return {name: torch.zeros(()) for name in losses} if rank == 1 and step % 4 == 0 else losses


def seldom_term(network: nn.Module, batch: Batch, step: int, rank: int) -> Losses:
    """A term that comes every seventh batch, never where all are measured anyway; once on one rank only."""
    losses = three_losses(network, batch)
    if step % 7 != 5 or (rank, step) == (1, 12):
        losses["size"] = torch.zeros(())
    return losses


def freezing(network: nn.Module, batch: Batch, step: int, rank: int) -> Losses:
    """The last layer is frozen for a while."""
    network[-1].requires_grad_(not 5 <= step < 10)
    return three_losses(network, batch)


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        losses: of (network, batch, number of the batch, rank).
        network: makes it from the dtype; the same one at every call.
        alone: makes the one process's network, if it is another.
        joined: whether the oracle is one process on the concatenated batch. Otherwise, where the ranks do different
            things, it is the mean of the ranks' losses.
        trainer: options of the Trainer.
        strategy: options of DistributedDataParallel.
        optimizer: options of MTAdam.
    """

    losses: Callable[[Any, Batch, int, int], Losses] = plain
    network: Callable[[torch.dtype], nn.Module] = make_network
    alone: Callable[[torch.dtype], nn.Module] | None = None
    joined: bool = True
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    @property
    def accumulate(self) -> int:
        return self.trainer.get("accumulate_grad_batches", 1)

    @property
    def clip(self) -> tuple[float, str] | None:
        limit = self.trainer.get("gradient_clip_val")
        return None if limit is None else (limit, self.trainer.get("gradient_clip_algorithm", "norm"))


SELDOM = {"balance_every": 5}
"""Of twenty steps, ten are measured: 0, 1, 2, 3, 4, 6, 8, 11, 14, 18."""

CASES = {
    "plain": Case(),
    "one scale for the network": Case(optimizer={"layers": "global", "anchor": "mean", "weight_decay": 0.1}),
    "accumulation": Case(trainer={"accumulate_grad_batches": 3}),
    "clipping by norm": Case(trainer={"gradient_clip_val": 0.01}, optimizer={"eps": 1e-2}),
    "clipping by value": Case(
        trainer={"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"}, optimizer={"eps": 1e-2}
    ),
    "accumulation and clipping": Case(
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.01}, optimizer={"eps": 1e-2}
    ),
    "static_graph": Case(strategy={"static_graph": True}),
    "gradient_as_bucket_view": Case(strategy={"gradient_as_bucket_view": True}),
    "other heads": Case(own_heads, Branches, joined=False),
    "other heads, find_unused_parameters": Case(
        own_heads, Branches, joined=False, strategy={"find_unused_parameters": True}
    ),
    "other heads, accumulation": Case(own_heads, Branches, joined=False, trainer={"accumulate_grad_batches": 2}),
    "constant terms": Case(constant_terms, joined=False),
    "constant terms, find_unused_parameters": Case(
        constant_terms, joined=False, strategy={"find_unused_parameters": True}
    ),
    "constant terms, accumulation": Case(constant_terms, joined=False, trainer={"accumulate_grad_batches": 2}),
    "changing terms in another order": Case(changing_terms, trainer={"accumulate_grad_batches": 3}),
    "frozen parameters": Case(network=make_frozen),
    "freezing and thawing": Case(freezing),
    "balance_every": Case(optimizer=SELDOM),
    "balance_every, accumulation and clipping": Case(
        trainer={"accumulate_grad_batches": 3, "gradient_clip_val": 0.01}, optimizer={**SELDOM, "eps": 1e-2}
    ),
    "balance_every, clipping by value": Case(
        trainer={"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"}, optimizer={**SELDOM, "eps": 1e-2}
    ),
    "balance_every, other heads": Case(own_heads, Branches, joined=False, optimizer=SELDOM),
    "balance_every, constant terms": Case(constant_terms, joined=False, optimizer=SELDOM),
    "balance_every, constant terms, accumulation": Case(
        constant_terms, joined=False, trainer={"accumulate_grad_batches": 3}, optimizer=SELDOM
    ),
    "balance_every, changing terms in another order": Case(
        changing_terms, trainer={"accumulate_grad_batches": 3}, optimizer={**SELDOM, "anchor": "mean"}
    ),
    "balance_every, a term that comes late": Case(
        late_term, optimizer={**SELDOM, "terms": ("fit", "size", "decay"), "anchor": "fit"}
    ),
    "balance_every, a term that comes seldom": Case(seldom_term, joined=False, optimizer={"balance_every": 3}),
    "balance_every, a term that comes seldom, accumulation": Case(
        seldom_term, joined=False, trainer={"accumulate_grad_batches": 2}, optimizer={"balance_every": 3}
    ),
    "low memory": Case(optimizer={"low_memory": True, "weight_decay": 0.1}),
    "low memory, the anchor is the last": Case(optimizer={"low_memory": True, "anchor": "decay", "amsgrad": True}),
    "low memory, other heads": Case(own_heads, Branches, joined=False, optimizer={"low_memory": True}),
    "low memory, constant terms": Case(constant_terms, joined=False, optimizer={"low_memory": True}),
    "low memory, freezing and thawing": Case(freezing, optimizer={"low_memory": True}),
    "BatchNorm": Case(network=make_normed, joined=False),
    "BatchNorm over all ranks": Case(network=make_synced, alone=make_normed),
}
