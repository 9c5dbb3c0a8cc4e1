"""Which processes train a network together, as the network's wrapper or its parameters say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mtadam.distributed import sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Processes:
    """The processes that train together in one call of ``backward``.

    Attributes:
        group: their group; ``None`` if this process trains alone.
        averages: whether the terms' gradients are to be averaged over the group in this call.
        sharded: whether the parameters are sharded over the group; the wrapper then averages by itself.
    """

    group: ProcessGroup | None = None
    averages: bool = False
    sharded: bool = False


ALONE = Processes()


def has_static_graph(model: nn.Module | None) -> bool:
    """Whether a wrapper in the network takes the first backward pass for all that will ever come."""
    modules = () if model is None else model.modules()
    return any(isinstance(module, DistributedDataParallel) and module.static_graph for module in modules)


def processes_of(model: nn.Module | None, parameters: Sequence[Tensor]) -> Processes:
    """The processes that train ``parameters``, which are those of ``model``, together.

    Args:
        model: the network as it is called: wrapped by ``DistributedDataParallel``, or around such a module; sharded by
            ``fully_shard``; or a bare module, which trains alone.
        parameters: what is trained.

    Raises:
        ValueError: there are several processes, or shards, and no model says whether they train together; a wrapper
            that is not supported; parameters of which only some are sharded, or not those of the optimizer.
    """
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    mesh = sharding.mesh_of(parameters)
    if mesh is not None:
        if model is None:
            raise ValueError(
                "The parameters are sharded. Call optimizer.backward(losses, model=model) with the network that"
                " fully_shard was applied to."
            )
        return Processes(sharding.group_of(mesh), sharded=True)
    if model is None and dist.get_world_size() > 1:
        raise ValueError(
            f"{dist.get_world_size()} processes are running, but nothing says whether they train together. Call"
            " optimizer.backward(losses, model=model) with the network wrapped by DistributedDataParallel; with the"
            " bare network each process trains alone."
        )
    trained = {id(parameter) for parameter in parameters}
    for module in () if model is None else model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(FSDP1)
        if isinstance(module, DistributedDataParallel) and not trained.isdisjoint(map(id, module.parameters())):
            if getattr(module, "_comm_hooks", []):
                raise ValueError(COMM_HOOK)
            if module._join_config.enable:
                raise ValueError(JOIN)
            if dist.get_world_size(module.process_group) == 1:
                return ALONE
            return Processes(module.process_group, averages=module.require_backward_grad_sync)
    if model is not None and sharding.holds_shards(model):
        raise ValueError(
            "The network is sharded, but the optimizer's parameters are not: each process would train them alone. Apply"
            " fully_shard to the whole network, and build the optimizer after that and before the first forward pass."
        )
    return ALONE


FSDP1 = (
    "FullyShardedDataParallel (FSDP1) hides the parameters in flat shards, where layers cannot be told apart and the"
    " gradients of single terms cannot be taken. Use FSDP2: torch.distributed.fsdp.fully_shard, in Lightning"
    " strategy=ModelParallelStrategy()."
)
COMM_HOOK = (
    "A DDP communication hook (ddp_comm_hook) would not be applied to the gradients of the terms, which are averaged"
    " apart from DDP's own. Leave it out."
)
JOIN = (
    "model.join() cannot stand in for a rank that has run out of batches: the terms' averages are not DDP's own. Give"
    " every rank the same number of batches, e.g. with torch.utils.data.DistributedSampler."
)
