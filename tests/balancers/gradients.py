"""What a test of a balancer on terms' gradients needs: steps by hand, and the gradients that they should start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_mtadam.balancers import Balancer
from tests.lightning_models import Batch, make_network, sgd, three_losses

TERMS = ("fit", "size", "decay")


class TwoHeads(nn.Module):
    """A trunk, and a head for each of two terms."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.trunk = make_network(dtype)
        self.first, self.second = make_network(dtype, seed=1)[2], make_network(dtype, seed=2)[2]

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk[:2](x)
        return {"first": self.first(hidden).square().mean(), "second": 50 * (self.second(hidden) - 1).abs().mean()}


def gradients_of(losses: Mapping[str, Tensor], model: nn.Module) -> dict[str, list[Tensor | None]]:
    """The gradient of each loss, by autograd alone."""
    parameters = list(model.parameters())
    return {
        name: list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        for name, loss in losses.items()
    }


def shown(balancer: Balancer, losses: Mapping[str, Tensor], model: nn.Module, **options: Tensor) -> list[Tensor | None]:
    """What a balancer leaves in ``p.grad``; the step is not taken."""
    optimizer = sgd(model)
    optimizer.zero_grad()
    balancer.backward(losses, optimizer, model=model, **options)
    return [parameter.grad for parameter in model.parameters()]


def last_gradients(balancer: Balancer, batches: Iterable[Batch], **factors: float) -> list[Tensor | None]:
    """What a balancer leaves at the last of some steps on ``three_losses``, some of them multiplied."""
    network = make_network()
    optimizer = sgd(network)
    for batch in batches:
        losses = {name: factors.get(name, 1) * loss for name, loss in three_losses(network, batch).items()}
        found = shown(balancer, losses, network)
        optimizer.step()
    return found


def assert_close(found: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-10) -> None:
    """Fail unless gradients are equal, relative to the largest entry of each, and absent where they should be."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            other = torch.as_tensor(other)
            assert float((one - other).abs().max()) <= tolerance * float(other.abs().max().clamp(min=1e-12))


def same_state(first: Balancer, second: Balancer) -> bool:
    """Whether two balancers remember the same, bit for bit."""
    one, two = first.state_dict()["state"], second.state_dict()["state"]
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def assert_resumed_bitwise(whole: Balancer, resumed: Balancer, batches: Sequence[Batch], at: int, folder: Path) -> None:
    """Fail unless a balancer goes on from the other's checkpoint, after so many batches, as the other does."""
    network = make_network()
    for batch in batches[:at]:
        shown(whole, three_losses(network, batch), network)
    torch.save(whole.state_dict(), folder / "balancer.pt")
    resumed.load_state_dict(torch.load(folder / "balancer.pt", weights_only=True))
    for batch in batches[at:]:
        expected = shown(whole, three_losses(network, batch), network)
        assert_close(shown(resumed, three_losses(network, batch), network), expected, 0)
    assert same_state(whole, resumed)
