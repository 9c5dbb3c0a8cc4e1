"""What the optimizer's arithmetic costs: ``python -m tests.benchmarks.optimizer_step``.

Of I terms on the parameters of four networks, as ratios of medians, interleaved in one process:

- ``MTAdam.step`` over I times a step of ``torch.optim.Adam(fused=True)``; each comes after a backward pass, which
  leaves as little in the cache as in a training;
- the authors' algorithm (``tests.benchmarks.authors``) over ``MTAdam.step``;
- the time in which the step would only move its least traffic, 16 I + 16 bytes a parameter (I gradients, M, I second
  moments and theta read; M, second moments and theta written; in fp32), over the time it takes. The bandwidth is that
  of a large ``a += b``, measured beside it;
- what ``MTAdam.backward`` adds to the bare calls of ``torch.autograd.grad``, where gradients are kept for the step,
  over the same I steps of Adam.

Gradients come from ``MTAdam.backward`` of cheap losses, outside the timed part.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from example_projects.mnist.network import Net
from lightning_mtadam import MTAdam
from tests.benchmarks.authors import AuthorsMTAdam
from tests.benchmarks.measuring import Piece, interleave, parse, parser, ratio, show, thread_counts, versions
from tests.benchmarks.networks import Losses, UNet, resnet18, size_of

VARIANTS: dict[str, dict[str, Any]] = {"eager": {}, "compile": {"compile": True}}
STREAMED = 1 << 26
"""Elements of the tensors by which the bandwidth is measured: more than any cache holds."""


def tiny_tensors() -> nn.Module:
    """400 tensors of 64 elements."""
    return nn.ParameterList([torch.randn(64) for _ in range(400)])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MNIST": Net,
    "ResNet-18": resnet18,
    "U-Net": UNet,
    "400 tiny": tiny_tensors,
}


def directions(network: nn.Module, terms: int) -> list[list[Tensor]]:
    """Per term and parameter, its gradient."""
    return [[torch.randn_like(parameter) for parameter in network.parameters()] for _ in range(terms)]


def linear_losses(network: nn.Module, gradients: Sequence[Sequence[Tensor]]) -> Losses:
    """Losses with these gradients."""
    return {
        f"term{index}": sum(((p * g).sum() for p, g in zip(network.parameters(), term, strict=True)), torch.zeros(()))
        for index, term in enumerate(gradients)
    }


class OurStep:
    """``MTAdam`` on linear losses, in the parts that are timed."""

    def __init__(self, network: nn.Module, gradients: Sequence[Sequence[Tensor]], **options: Any) -> None:
        self.network, self.gradients = network, gradients
        self.optimizer = MTAdam(network.named_parameters(), **options)
        self.losses: Losses = {}

    def forward(self) -> None:
        """Make the losses anew."""
        self.optimizer.zero_grad()
        self.losses = linear_losses(self.network, self.gradients)

    def backward(self) -> None:
        """Collect the gradients."""
        self.optimizer.backward(self.losses)

    def forward_backward(self) -> None:
        """All that comes before the step."""
        self.forward()
        self.backward()


def bare_gradients(ours: OurStep) -> None:
    """What nobody can do without."""
    parameters, losses = list(ours.network.parameters()), list(ours.losses.values())
    for index, loss in enumerate(losses):
        torch.autograd.grad(loss, parameters, retain_graph=index < len(losses) - 1)


def adam_step(network: nn.Module, gradients: Sequence[Sequence[Tensor]]) -> Piece:
    """A step of fused Adam after a backward pass of one term."""
    adam = torch.optim.Adam(network.parameters(), fused=True)

    def forward_backward() -> None:
        adam.zero_grad()
        linear_losses(network, gradients[:1])["term0"].backward()

    return Piece(adam.step, prepare=forward_backward)


def authors_step(network: nn.Module, gradients: Sequence[Sequence[Tensor]]) -> Callable[[], None]:
    """The authors' arithmetic, their backward passes left out."""
    authors = AuthorsMTAdam(network.parameters(), len(gradients))

    def run() -> None:
        authors.clock += 1
        for index, term in enumerate(gradients):
            for parameter, gradient in zip(authors.parameters, term, strict=True):
                parameter.grad = gradient
            authors.consume(index)
        authors.move()

    return run


def measure(name: str, terms: int, variants: Sequence[str], repeats: int) -> dict[str, object]:
    """A row of the table."""
    torch.manual_seed(0)
    make = NETWORKS[name]
    network = make()
    gradients = directions(network, terms)
    streamed, other = torch.zeros(STREAMED), torch.zeros(STREAMED)
    ours = {variant: OurStep(make(), gradients, **VARIANTS[variant]) for variant in variants}
    pieces = {
        "adam": adam_step(make(), gradients),
        "authors": Piece(authors_step(make(), gradients)),
        "stream": Piece(partial(streamed.add_, other)),
        **{variant: Piece(one.optimizer.step, prepare=one.forward_backward) for variant, one in ours.items()},
    }
    collecting = OurStep(network, gradients)
    pieces["backward"] = Piece(collecting.backward, prepare=collecting.forward)
    pieces["bare"] = Piece(partial(bare_gradients, collecting), prepare=collecting.forward)
    times = interleave(pieces, repeats)
    times["adam"] = [terms * seconds for seconds in times["adam"]]
    row: dict[str, object] = {"network": name, "I": terms}
    for variant in variants:
        row[f"{variant} / I Adam"] = ratio(times[variant], times["adam"])
    for variant in variants:
        row[f"authors' / {variant}"] = f"{ratio(times['authors'], times[variant]).value:.1f}"
    streaming = statistics.median(times["stream"]) / (12 * STREAMED) * (16 * terms + 16) * size_of(network)
    for variant in variants:
        row[f"{variant}, of the traffic limit"] = f"{streaming / statistics.median(times[variant]):.2f}"
    more = [backward - bare for backward, bare in zip(times["backward"], times["bare"], strict=True)]
    row["collecting / I Adam"] = f"{ratio(more, times['adam']).value:.2f}"
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parser(__doc__, repeats=30)
    options.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options.add_argument("--terms", type=int, nargs="+", default=[2, 3, 6, 10])
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    chosen = parse(options, arguments)
    print(versions("torchvision"))
    for threads in thread_counts(chosen):
        rows = [
            measure(name, terms, chosen.variants, chosen.repeats) for name in chosen.networks for terms in chosen.terms
        ]
        show(f"{threads} thread(s), n = {chosen.repeats}; in brackets the quartiles of the paired ratios", rows)


if __name__ == "__main__":
    main()
