"""A small network, sharded by ``fully_shard`` or whole, and loops that train it on 2 ranks as on one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lightning_mtadam.optim import MTAdam

Batch = tuple[Tensor, Tensor]
needs_fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch needs an accelerator"
)
RANKS, ROWS, STEPS = 2, 4, 9
TERMS = ("fit", "size", "code")


class Network(nn.Module):
    """Returns its code too. ``gain``, and the last layer's weight and bias, have fewer rows than there are ranks."""

    def __init__(self, *, dtype: torch.dtype = torch.float64, checkpointed: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second, self.last = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1)
        self.gain = nn.Parameter(torch.full((1,), 1.5))
        self.checkpointed = checkpointed
        self.to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.first(x).tanh()
        hidden = checkpoint(self.second, code, use_reentrant=False) if self.checkpointed else self.second(code)
        return code, self.gain * self.last(hidden.tanh())


def shard(network: Network, mesh: Any = None, **options: Any) -> Network:
    """Shard every layer, then the rest, over the mesh's ranks, or all."""
    for layer in (network.first, network.second, network.last):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(network, mesh=mesh, **options)


def losses_of(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Terms of very different size; "code" reaches only the first layer."""
    x, y = batch
    code, output = network(x)
    return {"fit": (output - y).square().mean(), "size": 50 * output.abs().mean(), "code": 0.01 * code.square().mean()}


def batches(
    rank: int | None, count: int = STEPS, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[Tensor, Tensor]]:
    """A rank's rows of each batch; all of them for ``None``."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        rows = torch.randn(RANKS * ROWS, 6, generator=generator, dtype=torch.float64).to(dtype)
        mine = rows if rank is None else rows[rank % RANKS * ROWS : (rank % RANKS + 1) * ROWS]
        yield mine[:, :5], mine[:, 5:]


def train_rows(
    network: nn.Module,
    optimizer: MTAdam,
    rank: int | None,
    *,
    accumulate: int = 1,
    clip: tuple[float, str] | None = None,
    losses: Any = losses_of,
    sync: bool = True,
    steps: int = STEPS,
    skip: int = 0,
) -> None:
    """Train on a rank's rows, or for ``None`` on all.

    Args:
        accumulate: batches per step.
        clip: limit and algorithm.
        losses: the terms of a network and a batch.
        sync: whether batches that only accumulate leave ``requires_gradient_sync`` as it is.
        steps: the number of batches.
        skip: how many of them were seen before.
    """
    dtype = next(network.parameters()).dtype
    for index, batch in list(enumerate(batches(rank, steps, dtype)))[skip:]:
        last = (index + 1) % accumulate == 0
        if not sync:
            network.set_requires_gradient_sync(last)
        found = losses(network, batch)
        optimizer.backward({name: loss / accumulate for name, loss in found.items()}, model=network)
        if last:
            if clip is not None:
                optimizer.clip_gradients(*clip)
            optimizer.step()
            optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; a collective."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def wholes(network: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter).clone() for name, parameter in network.named_parameters()}


def whole_state(optimizer: MTAdam) -> list[dict[str, Tensor]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [{key: whole(value).clone() for key, value in optimizer.state[p].items()} for p in parameters]


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest between two sets of tensors; nan counts as a difference."""
    pairs = [(found[name], value) for name, value in expected.items()]
    return max(float((ours - theirs).abs().nan_to_num(nan=torch.inf).max()) for ours, theirs in pairs)
