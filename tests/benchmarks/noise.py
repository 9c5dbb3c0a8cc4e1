"""How large rounding noise is, and what it does to the balance: ``python -m tests.benchmarks.noise``.

The network of the tests: ``h = lin(x)``; cross entropy of ``head(relu(bn(h)))``, which the bias of ``lin`` does not
change, and ``(h.mean(0) - 2)^2``. Beside it the first of 12 sigmoid layers, whose gradient is as small, and real.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mtadam import MTAdam, balancing
from tests.benchmarks.measuring import parse, parser, show, versions
from tests.optim.test_noise import BeforeNorm, deep

BATCHES = (64, 512, 8192)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def share(loss: Tensor, network: nn.Module, name: str) -> float:
    """The norm of the loss's gradient at a parameter, over that at all of them."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norms = torch.stack([torch.zeros(()).double() if g is None else g.double().norm() for g in gradients])
    return float(norms[names.index(name)] / norms.norm())


def inputs(batch: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Noise, the same in all dtypes."""
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def noise(batch: int, dtype: torch.dtype) -> float:
    """The share of the bias before the batch normalisation in the cross entropy's gradient."""
    model = BeforeNorm().to(dtype)
    return share(model.losses(inputs(batch, dtype))["entropy"], model, "lin.bias")


def first_of_12(dtype: torch.dtype) -> float:
    """The smallest share in the first of 12 sigmoid layers, which is no noise."""
    model, x = deep().to(dtype), inputs(64, dtype)
    losses = F.cross_entropy(model(x), (x[:, 0] > 0).long()), model(x).square().mean()
    return min(share(loss, model, "0.weight") for loss in losses)


def trained(dtype: torch.dtype, anchor: str, steps: int, *, bias: bool = True) -> float:
    """The second loss after some steps on fresh batches of 64; without the bias in the first term, what is right."""
    model = BeforeNorm(bias=bias).to(dtype)
    optimizer = MTAdam(model.named_parameters(), lr=1e-2, anchor=anchor)
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.backward(model.losses(inputs(64, dtype, step)))
        optimizer.step()
    return model.losses(inputs(64, dtype, steps))["distance"].item()


def without_the_rule(dtype: torch.dtype, anchor: str, steps: int) -> float:
    """As ``trained``, where every norm above zero is balanced."""
    kept, balancing.ROUNDING = balancing.ROUNDING, 0.0
    try:
        return trained(dtype, anchor, steps)
    finally:
        balancing.ROUNDING = kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    steps = 10 if parse(parser(__doc__, repeats=1), arguments).quick else 400
    torch.set_num_threads(1)
    print(versions())
    sizes, losses = [], []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        row = {f"noise, batch {batch}": f"{noise(batch, dtype):.0e}" for batch in BATCHES}
        epsilon = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        threshold = {"noise below": f"{balancing.ROUNDING * epsilon:.1e}"}
        sizes.append({"dtype": name, **row, "first of 12 layers": f"{first_of_12(dtype):.0e}", **threshold})
        for anchor in ("first", "mean"):
            found = {"every norm balanced": without_the_rule(dtype, anchor, steps)}
            found |= {"noise left out": trained(dtype, anchor, steps)}
            found |= {"right": trained(dtype, anchor, steps, bias=False)}
            losses.append({"dtype": name, "anchor": anchor, **{key: f"{value:.4f}" for key, value in found.items()}})
    show("Shares of a term's norm over the network", sizes)
    show(f"The second loss after {steps} steps", losses)


if __name__ == "__main__":
    main()
