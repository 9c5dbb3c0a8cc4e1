"""From a balanced run to constant weights: one number per term, to train on with any optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_mtadam.balancers import Balancer
from lightning_mtadam.terms import BalancesTerms

__all__ = ["ExportedWeights", "WeightsSource", "export_weights"]


@runtime_checkable
class WeightsSource(Protocol):
    """What weights can be exported from: MTAdam, or another balancer.

    It may also have ``layer_sizes() -> Tensor`` [L], the number of elements of each layer; they count alike otherwise.

    Example:
        >>> class Known:
        ...     def average_weights(self):
        ...         return {"fit": torch.tensor([1.0, 1.0]), "decay": torch.tensor([0.1, 0.4])}
        >>> export_weights(Known())
        ExportedWeights({'fit': 1, 'decay': 0.2}, spread={'fit': 1, 'decay': 2})
    """

    def average_weights(self) -> Mapping[str, Tensor]:
        """Per term, the weights averaged over the steps, one per layer: [L]; nan where the term never reached it."""


class ExportedWeights(dict[str, float]):
    """A constant weight per term.

    Args:
        weights: by term.
        spread: by term.

    Attributes:
        spread: by term, the factor by which layers typically differ from the weight: the geometric standard deviation
            over the layers. 1.0: all layers agree.

    Example:
        >>> weights = ExportedWeights({"fit": 1.0, "decay": 0.2}, spread={"fit": 1.0, "decay": 2.0})
        >>> weights["decay"], weights.spread["decay"]
        (0.2, 2.0)
    """

    def __init__(self, weights: Mapping[str, float], spread: Mapping[str, float]) -> None:
        super().__init__(weights)
        self.spread = dict(spread)

    def __repr__(self) -> str:
        weights, spread = (
            "{" + ", ".join(f"{term!r}: {value:.4g}" for term, value in found.items()) + "}"
            for found in (self, self.spread)
        )
        return f"{type(self).__name__}({weights}, spread={spread})"


def export_weights(source: object) -> ExportedWeights:
    """The constant weights that reproduce the average balance of a run, to train on with plain Adam.

    Each weight is the geometric mean of what multiplied the term's gradient, over the steps and, weighted by their
    numbers of elements, over the layers. A layer that one term alone reaches is left out, where the term reaches
    others: no weight matters to Adam there.

    Args:
        source: a Lightning Trainer after ``fit``, an MTAdam optimizer, or any object with
            a method ``average_weights``, see :class:`~lightning_mtadam.export.WeightsSource`. A Trainer must have one
            MTAdam; or none, and a module with a ``balancer`` that has the method.

    Returns:
        The weights by term, and their ``spread`` over the layers.

    Raises:
        TypeError: nothing can be exported from such an object.
        ValueError: a Trainer with several MTAdams or with nothing that balances; no step was made; a term never
            reached a layer.

    Example:
        >>> from torch import nn
        >>> from lightning_mtadam import MTAdam
        >>> model = nn.Linear(4, 2).double()
        >>> optimizer = MTAdam(model.named_parameters(), lr=1e-2)
        >>> for _ in range(10):
        ...     error = (model(torch.ones(8, 4).double()) - 1).square().mean()
        ...     optimizer.zero_grad()
        ...     optimizer.backward({"fit": error, "same": 1e4 * error})
        ...     optimizer.step()
        >>> weights = export_weights(optimizer)
        >>> weights
        ExportedWeights({'fit': 1, 'same': 0.0001}, spread={'fit': 1, 'same': 1})
        >>> total = weights["fit"] * error + weights["same"] * (1e4 * error)  # for torch.optim.Adam
    """
    balancer = _balancer_of(source)
    found = {term: weights.detach().to("cpu").double() for term, weights in balancer.average_weights().items()}
    _check(found, type(balancer).__name__)
    reached = torch.stack([~weights.isnan() for weights in found.values()], 1)  # [L, I]
    shared = reached.sum(1) > 1
    sizes = balancer.layer_sizes() if hasattr(balancer, "layer_sizes") else torch.ones(len(reached), device="cpu")
    weights, spread = dict[str, float](), dict[str, float]()
    for (term, averages), mine in zip(found.items(), reached.unbind(1), strict=True):
        chosen = mine & shared if bool((mine & shared).any()) else mine
        weights[term], spread[term] = _over_layers(averages[chosen], sizes[chosen].double())
    return ExportedWeights(weights, spread)


def _over_layers(averages: Tensor, sizes: Tensor) -> tuple[float, float]:
    """The geometric mean and standard deviation over layers of these sizes: [L] each."""
    if bool((averages == 0).any()):
        return 0.0, math.inf if averages.any() else 1.0
    share, logs = sizes / sizes.sum(), averages.log()
    mean = (share * logs).sum()
    deviation = (share * (logs - mean).square()).sum().sqrt()
    return float(mean.exp()), float(deviation.exp())


def _check(found: Mapping[str, Tensor], owner: str) -> None:
    missing = [term for term, weights in found.items() if bool(weights.isnan().all())]
    if len(missing) == len(found):
        raise ValueError(
            f"There are no weights to export: {owner} has made no step yet, or none since a checkpoint was loaded that"
            " holds no average. Export after training."
        )
    if missing:
        raise ValueError(
            f"The term {missing[0]!r} has no weight to export: in no step has it reached a layer. Train until it does,"
            " or leave it out of terms."
        )


def _balancer_of(source: object) -> Any:
    """What has the weights: the source itself, or what trains in a Trainer."""
    if _keeps_averages(source):
        return source
    if not (hasattr(source, "optimizers") and hasattr(source, "lightning_module")):
        raise TypeError(
            "export_weights takes a Lightning Trainer, an MTAdam optimizer or an object with a method average_weights,"
            f" but got a {type(source).__name__}. Pass the optimizer that balanced the run, or its Trainer."
        )
    found = [optimizer for optimizer in source.optimizers if isinstance(optimizer, BalancesTerms)]
    if len(found) > 1:
        raise ValueError(
            f"The Trainer has {len(found)} MTAdam optimizers, each with weights of its own. Pass one of them, e.g."
            " export_weights(trainer.optimizers[0])."
        )
    balancer = found[0] if found else getattr(source.lightning_module, "balancer", None)
    if not _keeps_averages(balancer):
        names = [type(optimizer).__name__ for optimizer in source.optimizers]
        raise ValueError(
            f"Nothing in the Trainer has balanced the terms: its optimizers are {names}, and its module has no balancer"
            " with average_weights(). Call trainer.fit() on a module that trains with MTAdam first."
        )
    return balancer


def _keeps_averages(source: object) -> bool:
    """Whether it has averages to read; what ``Balancer`` has is overridden by those that keep some."""
    method = getattr(type(source), "average_weights", None)
    return isinstance(source, WeightsSource) and method is not Balancer.average_weights
