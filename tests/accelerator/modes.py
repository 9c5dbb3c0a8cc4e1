"""What is tried on an accelerator beside the tests: precisions, layouts, runs that repeat, graphs, two ranks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mtadam import MTAdam
from tests.accelerator.device import NAME
from tests.accelerator.measures import Row
from tests.accelerator.networks import resnet18

STEPS = 6


def network_of(quick: bool) -> nn.Module:
    """ResNet-18, or what is much smaller and has the same kinds of layers."""
    if not quick:
        return resnet18()
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )


def losses_of(output: Tensor, labels: Tensor) -> dict[str, Tensor]:
    output = output.float()
    classes = nn.functional.cross_entropy(output, labels)
    return {"class": classes, "size": output.square().mean(), "sum": 30 * output.sum(1).abs().mean()}


def batch_of(device: str, pixels: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, pixels, pixels, generator=generator)
    return images.to(device), (torch.arange(8) % 10).to(device)


def trained(
    device: str,
    quick: bool,
    change: Callable[[nn.Module], nn.Module] = lambda network: network,
    images: Callable[[Tensor], Tensor] = lambda images: images,
    steps: int = STEPS,
    **options: Any,
) -> tuple[nn.Module, MTAdam]:
    """ResNet-18 after some steps on one batch."""
    torch.manual_seed(0)
    network = change(network_of(quick).to(device))
    optimizer = MTAdam(network.named_parameters(), **options)
    inputs, labels = batch_of(device)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(losses_of(network(images(inputs)), labels))
        optimizer.step()
    optimizer.synchronize()
    return network, optimizer


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((one.detach().cpu().double() - other.detach().cpu().double()).abs().max()) for one, other in pairs)


def compared(case: str, first: nn.Module, second: nn.Module, tolerance: float) -> Row:
    found = largest_difference(first, second)
    return Row("modes", case, f"differs by {found:.2g}", found <= tolerance)


def anywhere(device: str, quick: bool) -> Iterator[Row]:
    """What every accelerator can do."""
    plain, _ = trained(device, quick)
    again, _ = trained(device, quick)
    deterministic = device != "cuda"  # convolutions of CUDA may choose another way
    yield compared("two runs alike", plain, again, 0.0 if deterministic else 1e-2)
    torch.use_deterministic_algorithms(True)
    try:
        yield compared("two runs, deterministic algorithms", trained(device, quick)[0], trained(device, quick)[0], 0.0)
    finally:
        torch.use_deterministic_algorithms(False)
    last: dict[str, Any] = {"memory_format": torch.channels_last}
    other, _ = trained(device, quick, change=lambda one: one.to(**last), images=lambda one: one.to(**last))
    kept = all(one.is_contiguous(**last) for one in other.parameters() if one.dim() == 4)
    yield Row("modes", "channels_last stays so", str(kept), kept)
    yield compared("channels_last", plain, other, 2e-2)
    narrow, _ = trained(device, quick, change=lambda one: one.bfloat16(), images=lambda one: one.bfloat16())
    finite = all(bool(parameter.isfinite().all()) for parameter in narrow.parameters())
    yield Row("modes", "bfloat16 parameters stay finite", str(finite), finite)


def scaled(device: str, quick: bool) -> Iterator[Row]:
    """fp16 autocast with a gradient scaler, whose scale is too high at first; then an inf is forced."""
    torch.manual_seed(0)
    network = network_of(quick).to(device)
    optimizer = MTAdam(network.named_parameters(), on_nonfinite="skip")
    scaler = torch.amp.GradScaler(device, init_scale=2.0**18)
    images, labels = batch_of(device)
    unchanged: list[bool] = []
    for index in range(24):
        before = [parameter.detach().clone() for parameter in network.parameters()]
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            losses = losses_of(network(images), labels)
        if index == 20:
            losses["size"] = losses["size"] * torch.inf
        scale = torch.tensor(scaler.get_scale(), device=device)
        optimizer.backward(losses, grad_output=scale, loss_scale=scale)
        finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())
        scaler.scale(torch.ones((), device=device))  # it must have been asked once before it steps
        if finite:
            optimizer.step()
        else:
            optimizer.zero_grad()
            scaler.update(scaler.get_scale() / 2)
            same = all(torch.equal(one, other) for one, other in zip(before, network.parameters(), strict=True))
            unchanged.append(same)
    finite = all(bool(parameter.isfinite().all()) for parameter in network.parameters())
    said = f"{len(unchanged)} of 24 steps skipped, which changed nothing: {all(unchanged)}; finite: {finite}"
    yield Row("modes", "fp16 with a gradient scaler", said, finite and all(unchanged) and 0 < len(unchanged) < 20)


def on_cuda(device: str, quick: bool) -> Iterator[Row]:
    """What only CUDA has."""
    for width in (1, 37, 255, 257):
        rows = []
        for options in ({}, {"compile": True}):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 10)).to(device)
            optimizer = MTAdam(network.named_parameters(), **options)
            images, labels = torch.ones(8, 3, device=device), torch.arange(8, device=device)
            for _ in range(STEPS):
                optimizer.zero_grad()
                optimizer.backward(losses_of(network(images), labels))
                optimizer.step()
            rows.append(network)
        yield compared(f"compile, layers of {width}", *rows, 1e-5)
    torch.manual_seed(0)
    graphed = resnet18().to(device)
    images, labels = batch_of(device)
    eager, _ = trained(device, quick)
    called = torch.cuda.make_graphed_callables(graphed, (images.clone(),))
    torch.manual_seed(0)
    graphed.load_state_dict(resnet18().state_dict())
    optimizer = MTAdam(graphed.named_parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        optimizer.backward(losses_of(called(images), labels))
        optimizer.step()
    yield compared("CUDA graph of the network", eager, graphed, 1e-2)
    if torch.cuda.device_count() < 2:
        yield Row("ranks", "two ranks over NCCL", "one device only: not run")
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder,), nprocs=2)
        first, second = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
        same = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        yield Row("ranks", "two ranks over NCCL are alike", str(same), same)


def _rank(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = resnet18().cuda()
    model = DistributedDataParallel(network, device_ids=[rank])
    optimizer = MTAdam(network.named_parameters())
    images, labels = batch_of("cuda")
    for _ in range(STEPS):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model(images + rank), labels), model=model)
        optimizer.step()
    torch.save([parameter.detach().cpu() for parameter in network.parameters()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def modes(device: str, quick: bool) -> Iterator[Row]:
    """All of them that the device can do."""
    yield from anywhere(device, quick)
    yield from scaled(device, quick)
    if device != NAME:
        yield from on_cuda(device, quick)
