"""What a training step at the paper's size asks of a device, and from that a guess at the hours of a run.

``python -m tests.benchmarks.paper_size`` counts, on torch's "meta" device, the floating-point operations of one step of
each image project and the operations that torch is called with: about as many kernels. Nothing is computed, so it takes
seconds and no GPU. The hours are those of the assumptions that are given: so many operations a second (--tflops), and
so long between two kernels (--microseconds). Work and launches are added, as if they never overlapped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from example_projects.common.image_module import ImageModule
from example_projects.common.methods import IMAGE_METHODS
from example_projects.common.report import markdown
from example_projects.cyclegan.losses import SETTINGS
from example_projects.cyclegan.module import CycleGAN
from example_projects.pix2pix.module import Pix2Pix
from example_projects.srgan.module import LAMBDAS, SRGAN
from example_projects.srgan.perceptual import PerceptualLoss, empty_features
from example_projects.srgan.pretraining import Pretraining

UPDATE = {"mtadam": 130, "adam": 7}  # kernels of a step beside the gradients': docs/gpu.md counts them


class Run(NamedTuple):
    """One run of a table.

    Attributes:
        make: the module, on the device that is the default.
        batch: the shapes of a batch's images.
        generator: what the method trains.
        steps: of a run.
    """

    make: Callable[[str], ImageModule]
    batch: Sequence[tuple[int, ...]]
    generator: Callable[[Any], nn.Module]
    steps: int


def srgan(method: str) -> SRGAN:
    """SRGAN with the perceptual loss of VGG19."""
    features, name = empty_features(16)
    perceptual = PerceptualLoss(features, name).to(torch.device("meta"))
    return SRGAN(IMAGE_METHODS[method], LAMBDAS["unbalanced"], 1e-4, perceptual, epochs=1)


PAIR, CROPS = [(1, 3, 256, 256)] * 2, [(16, 3, 24, 24), (16, 3, 96, 96)]
RUNS = {
    "pix2pix, facades": Run(
        lambda method: Pix2Pix(IMAGE_METHODS[method], {"l1": 1.0, "gan": 1.0}, 2e-4, epochs=200),
        PAIR, lambda module: module.generator, 200 * 400,
    ),
    "pix2pix, maps": Run(
        lambda method: Pix2Pix(IMAGE_METHODS[method], {"l1": 1.0, "gan": 1.0}, 2e-4, epochs=200),
        PAIR, lambda module: module.generator, 200 * 1096,
    ),
    "CycleGAN, horse2zebra": Run(
        lambda method: CycleGAN(IMAGE_METHODS[method], SETTINGS["unbalanced"], 2e-4, epochs=200),
        PAIR, lambda module: module.generators, 200 * 1334,
    ),
    "CycleGAN, maps": Run(
        lambda method: CycleGAN(IMAGE_METHODS[method], SETTINGS["unbalanced"], 2e-4, epochs=200),
        PAIR, lambda module: module.generators, 200 * 1096,
    ),
    "SRGAN, pretraining": Run(
        lambda method: Pretraining(1e-4, epochs=1, width=64, blocks=16),
        CROPS, lambda module: module.generator, 1_000_000,
    ),
    "SRGAN": Run(srgan, CROPS, lambda module: module.generator, 200_000),
}  # fmt: skip


class Calls(TorchDispatchMode):
    """Counts what torch is called with, but for views, which are no kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and call."""
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def without_updates(module: ImageModule, method: str, generator: nn.Module) -> None:
    """Let a step end with gradients: of every term where MTAdam has its turn, else of the sum."""
    rivals = nn.ModuleList(child for child in module.children() if child is not generator)
    networks = {"generator": generator, "rival": rivals}

    def update(losses: dict[str, Tensor], network: str) -> None:
        parameters = list(networks[network].parameters())
        each = method == "mtadam" and network == "generator"
        for loss in losses.values() if each else [sum(losses.values())]:
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)

    names = list(networks) if len(rivals) else "generator"
    setattr(module, "update", update)  # noqa: B010
    setattr(module, "optimizers", lambda: names)  # noqa: B010


def count(run: Run, method: str) -> tuple[float, int]:
    """The teraFLOP of a step, and its kernels."""
    with torch.device("meta"):
        module = run.make(method)
        batch = tuple(torch.zeros(shape) for shape in run.batch)
    without_updates(module, method, run.generator(module))
    with FlopCounterMode(display=False) as flops, Calls() as calls:
        module.training_step(batch, 0)
    return flops.get_total_flops() / 1e12, calls.count + UPDATE[method] + UPDATE["adam"]


def rows(tflops: float, microseconds: float) -> list[dict[str, str]]:
    """The table: a row per run and method."""
    found = []
    for name, run in RUNS.items():
        for method in UPDATE if name != "SRGAN, pretraining" else ["adam"]:
            work, kernels = count(run, method)
            seconds = work / tflops + kernels * microseconds / 1e6
            found.append({
                "run": name, "method": method, "TFLOP a step": f"{work:.2f}", "kernels a step": str(kernels),
                "ms a step": f"{1e3 * seconds:.0f}", "steps": str(run.steps),
                "hours": f"{seconds * run.steps / 3600:.1f}",
            })  # fmt: skip
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.paper_size", description=__doc__)
    parser.add_argument("--tflops", type=float, default=20.0, help="10^12 floating-point operations a second")
    parser.add_argument("--microseconds", type=float, default=25.0, help="between two kernels")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    print(markdown(rows(options.tflops, options.microseconds)))
