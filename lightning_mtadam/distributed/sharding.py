"""Tensors of which every process holds a part (``DTensor``, as FSDP2 makes them), seen as this process's part."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Sharding: TypeAlias = "tuple[DeviceMesh, tuple[int, ...]]"
"""A mesh, and those of its dimensions over which a tensor is cut."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: no tensor can be one, and importing takes 1 s
    return module is not None and isinstance(tensor, module.DTensor)


def holds_shards(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model, or to a part of it."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(part, module.FSDPModule) for part in model.modules())


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory with the whole; the tensor itself if it is not sharded."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def local_gradient(parameter: Tensor) -> Tensor | None:
    """This process's part of ``parameter.grad``, cut as the parameter is; a collective if it is not yet."""
    gradient: Any = parameter.grad
    if is_sharded(parameter) and gradient is not None:
        wanted = parameter.placements  # type: ignore[attr-defined]
        if gradient.placements != wanted:
            gradient = gradient.redistribute(placements=wanted)
        gradient = local(gradient)
    return gradient  # type: ignore[no-any-return]


def average(whole: Tensor, parameter: Tensor) -> Tensor:
    """Average a whole tensor that each process has of its own, and cut it as the parameter is."""
    from torch.distributed.tensor import DTensor, Partial

    cut: Any = parameter
    mine = DTensor.from_local(whole, cut.device_mesh, [Partial("avg")] * cut.device_mesh.ndim, run_check=False)
    averaged: Tensor = mine.redistribute(placements=cut.placements)
    return averaged


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """The whole of which ``part`` is this process's part, cut as ``tensor`` is."""
    if not is_sharded(tensor):
        return part
    whole: Any = tensor
    made: Tensor = type(whole.data).from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return made


def zeros(shape: Sequence[int], dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """Zeros cut as the parameter is; ``shape`` is the parameter's, after any leading dimensions."""
    if not is_sharded(parameter):
        return torch.zeros(tuple(shape), dtype=dtype, device=parameter.device)
    from torch.distributed.tensor import zeros as sharded_zeros

    mesh, placements = _shifted(parameter, len(shape) - parameter.dim())
    made: Tensor = sharded_zeros(tuple(shape), dtype=dtype, device_mesh=mesh, placements=placements)
    return made


def place(whole: Tensor, parameter: Tensor) -> Tensor:
    """Cut a whole tensor of a checkpoint as the parameter is; it may have leading dimensions more."""
    if not is_sharded(parameter) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = _shifted(parameter, whole.dim() - parameter.dim())
    made: Tensor = distribute_tensor(whole, mesh, placements)
    return made


def mesh_of(parameters: Sequence[Tensor]) -> DeviceMesh | None:
    """The mesh over which the parameters are sharded; ``None`` if none is.

    Raises:
        ValueError: some are and some are not, or they are on different meshes, or cut in an unknown way.
    """
    meshes = {tensor.device_mesh if is_sharded(tensor) else None for tensor in parameters}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise ValueError(
            "Some parameters of the optimizer are sharded and some are not, or over another mesh: the processes would"
            " train different networks. Apply fully_shard to the whole network, the root module last, and build the"
            " optimizer after that and before the first forward pass."
        )
    mesh: DeviceMesh | None = meshes.pop() if meshes else None
    if mesh is not None:
        for tensor in parameters:
            sharding_of(tensor)
    return mesh


def group_of(mesh: DeviceMesh) -> ProcessGroup:
    """The processes of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() != dist.get_world_size():
        raise ValueError("A mesh of several dimensions must hold all processes.")
    world = dist.group.WORLD
    assert world is not None
    return world


def sharding_of(tensor: Tensor) -> Sharding | None:
    """Over what the tensor is cut; ``None`` if each process holds all of it.

    Raises:
        ValueError: it is cut in a way that is not supported.
    """
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard

    whole: Any = tensor
    for placement in whole.placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"A parameter is placed as {whole.placements}. MTAdam supports fully_shard, with replication or not,"
                " but not together with tensor parallelism over the same dimension."
            )
    cut = tuple(index for index, placement in enumerate(whole.placements) if type(placement) is Shard)
    return (whole.device_mesh, cut) if cut else None


def add_up(values: Tensor, sharding: Sharding | None) -> Tensor:
    """Add the values of all processes that hold different parts."""
    if sharding is None:
        return values
    mesh, cut = sharding
    total = values.clone()
    for dimension in cut:
        dist.all_reduce(total, group=mesh.get_group(dimension))
    return total


def join_norms(norms: Tensor, sharding: Sharding | None) -> Tensor:
    """The L2 norms of whole tensors from those of the parts. Squared in float64, which they cannot over- or underflow.

    Args:
        norms: of this process's parts, any shape; fp32 or float64.
        sharding: how the tensors are cut.
    """
    if sharding is None:
        return norms
    return add_up(norms.double().square(), sharding).sqrt().to(norms.dtype)


def join_rows(norms: Tensor, shardings: Sequence[Sharding | None]) -> Tensor:
    """The norms of whole tensors from those of this process's parts, [P, k], of P tensors that are cut so; in place."""
    for cut in dict.fromkeys(shardings):  # in one order on all processes
        if cut is not None:
            rows = torch.tensor([row for row, other in enumerate(shardings) if other == cut], device=norms.device)
            norms[rows] = join_norms(norms[rows], cut)
    return norms


def _shifted(parameter: Tensor, by: int) -> tuple[DeviceMesh, list[Any]]:
    from torch.distributed.tensor import Shard

    whole: Any = parameter
    return whole.device_mesh, [Shard(p.dim + by) if type(p) is Shard else p for p in whole.placements]
