"""What an importance does to a small variational autoencoder: ``python -m tests.benchmarks.importance``.

The numbers are those of docs/importance.md. Data are made: 16 numbers that depend on 3.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_mtadam import MTAdam

NOISE = 0.1  # standard deviation of the data's noise, and of the decoder's


class VAE(nn.Module):
    """Two layers to a code of 4 numbers, and two back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 16))

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        """The two terms of the negative evidence bound in nats, but for a constant."""
        mean, log_variance = self.encoder(batch).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        error = (self.decoder(code) - batch).square().sum(1) / (2 * NOISE**2)
        kl = (log_variance.exp() + mean.square() - 1 - log_variance).sum(1) / 2
        return {"reconstruction": error.mean(), "kl": kl.mean()}


def make_data(count: int = 2048) -> Tensor:
    """Always the same rows, [count, 16]."""
    generator = torch.Generator().manual_seed(0)
    factors, mixing = torch.randn(count, 3, generator=generator), torch.randn(3, 16, generator=generator)
    return (factors @ mixing).sin() + NOISE * torch.randn(count, 16, generator=generator)


def train(
    importance: float | Callable[[int], float] | None,
    *,
    seed: int = 0,
    steps: int = 3000,
    ramp: Callable[[int], float] | None = None,
) -> dict[int, tuple[float, float]]:
    """Reconstruction and KL in nats after some steps; ``None``: Adam on the sum. ``ramp``: a factor on the KL."""
    torch.manual_seed(seed)
    model, data = VAE(), make_data()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3) if importance is None else MTAdam(model.parameters(), 3e-3)
    found = {}
    for step in range(steps):
        losses = model.losses(data[torch.randint(len(data), (128,))])
        if ramp is not None:
            losses["kl"] = losses["kl"] * ramp(step)
        optimizer.zero_grad()
        if isinstance(optimizer, MTAdam):
            optimizer.set_importance({"kl": importance(step) if callable(importance) else importance})
            optimizer.backward(losses)
        else:
            (losses["reconstruction"] + losses["kl"]).backward()
        optimizer.step()
        if step + 1 in (100, 500, steps):
            with torch.no_grad():
                found[step + 1] = tuple(float(loss) for loss in model.losses(data).values())
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command is told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    given = parse(arguments)

    def rising(step: int) -> float:
        return min(1.0, (step + 1) / 1000)

    settings = {
        "Adam on the sum": {"importance": None},
        **{f"importance {value}": {"importance": value} for value in (1.0, 0.3, 0.1, 0.03, 0.01)},
        "0.1, warm-up as importance": {"importance": lambda step: 0.1 * rising(step)},
        "0.1, ramp on the loss": {"importance": 0.1, "ramp": rising},
    }
    print("| setting | step | reconstruction | KL | sum |\n| --- | --- | --- | --- | --- |")
    for name in [name for name in settings if given.only in name]:
        runs = [train(seed=seed, steps=given.steps, **settings[name]) for seed in range(given.seeds)]
        for step in runs[0]:
            rows = sorted(run[step] for run in runs)
            reconstruction, kl = (sorted(column)[len(rows) // 2] for column in zip(*rows, strict=True))
            print(f"| {name} | {step} | {reconstruction:.1f} | {kl:.1f} | {reconstruction + kl:.1f} |")


if __name__ == "__main__":
    main()
