"""One training run, without the Trainer."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from example_projects.gap.settings import Setting
from example_projects.problems.problem import Problem
from lightning_mtadam import NonFiniteError

Decay: TypeAlias = Literal["none", "linear"]


def train(problem: Problem, setting: Setting, lr: float, decay: Decay, steps: int, seed: int) -> dict[str, float]:
    """Train a network.

    Args:
        problem: what to train.
        setting: how.
        lr: the learning rate at the beginning.
        decay: "none", or "linear" to zero.
        steps: how many.
        seed: of the network's weights, the order of the data, and the weights of the losses.

    Returns:
        The problem's figures, and "training_loss": with the balanced weights, over the last tenth of the steps. They
        are nan if the losses became infinite.
    """
    network = problem.make_network(seed)
    optimizer = setting.configure(problem, network, lr)
    weights = setting.weights(problem, seed)
    change_at = setting.anchors(problem).change_at(steps)
    late: list[Tensor] = []
    try:
        for step, batch in enumerate(problem.batches(seed, steps)):
            if step == change_at:
                optimizer = taken_over(optimizer, setting.configure(problem, network, lr, late=True))
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) if decay == "linear" else lr
            optimizer.zero_grad()
            losses = problem.losses(network, batch)
            weighted = {name: weights[name] * loss for name, loss in losses.items()}
            if setting.optimizer == "adam":
                sum(weighted.values()).backward()
            else:
                optimizer.backward(weighted)
            optimizer.step()
            if step >= int(0.9 * steps):
                late.append(sum(problem.balanced_weights[name] * loss.detach() for name, loss in losses.items()))
    except NonFiniteError:
        late = []
    loss = math.nan if not late else float(sum(late)) / len(late)
    figures = {**problem.metrics(network), "training_loss": loss}
    return figures if math.isfinite(loss) else dict.fromkeys(figures, math.nan)


def taken_over(early: Optimizer, late: Optimizer) -> Optimizer:
    """The second optimizer, with all that the first one remembers."""
    late.load_state_dict(early.state_dict())
    return late
