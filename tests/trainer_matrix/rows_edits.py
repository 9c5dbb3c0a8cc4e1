"""What hooks of the module do to ``p.grad`` between backward and step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.lightning_models import (
    Regression,
    adam,
    assert_same,
    fit,
    largest_difference,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
)
from tests.trainer_matrix.table import ADAM, HAND_LOOP, REFUSED, row

GROUP = "Around a step"
EDITED = "`p.grad` edited in `on_after_backward`, `on_before_optimizer_step`, `configure_gradient_clipping`, by hand"
HOOKS = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping")


def forget_head(head: nn.Module) -> None:
    """As DINO does in its first epoch."""
    for parameter in head.parameters():
        parameter.grad = None


def mask(head: nn.Module) -> None:
    for parameter in head.parameters():
        parameter.grad[:1] = 0


def clip_norm(head: nn.Module) -> None:
    nn.utils.clip_grad_norm_(head.parameters(), 1e-2)


def clip_value(head: nn.Module) -> None:
    nn.utils.clip_grad_value_(head.parameters(), 1e-3)


def add_noise(head: nn.Module) -> None:
    for parameter in head.parameters():
        parameter.grad.add_(torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view_as(parameter))


EDITS = (forget_head, mask, clip_norm, clip_value, add_noise)


class Edited(Regression):
    """One term; the last layer's gradients are edited in a hook."""

    def __init__(self, hook: str, edit: Callable[[nn.Module], None], make_optimizer: Any = make_mtadam) -> None:
        super().__init__(make_optimizer)
        self.hook, self.edit = hook, edit

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"fit": three_losses(self.network, batch)["fit"]}

    def _edit(self, hook: str) -> None:
        if hook == self.hook:
            self.edit(self.network[-1])

    def on_after_backward(self) -> None:
        self._edit("on_after_backward")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._edit("on_before_optimizer_step")

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        self._edit("configure_gradient_clipping")


@row(GROUP, EDITED, ADAM, cases=[(hook, edit) for hook in HOOKS for edit in EDITS])
def an_edit_counts_as_it_does_for_adam(folder: Path, hook: str, edit: Callable[[nn.Module], None]) -> None:
    ours, theirs = Edited(hook, edit), Edited(hook, edit, adam)
    for module in (ours, theirs):
        fit(module, make_loader())
    assert largest_difference(ours.network, theirs.network) < 1e-12
    assert largest_difference(ours.network, make_network()) > 1e-2


@row(GROUP, "`zero_grad()` in a hook skips the step", ADAM)
def a_hook_that_resets_all_gradients_skips_the_step(folder: Path) -> None:
    class Skipping(Regression):
        def on_after_backward(self) -> None:
            self.zero_grad()

    module = Skipping()
    fit(module, make_loader())
    assert_same(module.network, make_network())


@row(GROUP, "`register_hook`, which sees each term; `register_post_accumulate_grad_hook`, once a batch", HAND_LOOP)
def hooks_of_parameters_are_called_and_count(folder: Path) -> None:
    module, called = Regression(), []
    last = module.network[-1]
    last.weight.register_hook(lambda gradient: called.append("term"))
    last.weight.register_post_accumulate_grad_hook(lambda parameter: called.append("p.grad"))
    last.bias.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.zero_())
    fit(module, make_loader(2), max_epochs=1)
    assert called == ["term", "term", "p.grad"] * 2  # "decay" does not reach it
    assert torch.equal(last.bias, make_network()[-1].bias)
    assert not torch.equal(last.weight, make_network()[-1].weight)


@row(
    "Refused",
    "edits of `p.grad` with `denominator='own'`, or `low_memory=True` but for `denominator='sum'`",
    REFUSED,
    cases=[("denominator", "own"), ("low_memory", True)],
)
def what_cannot_count_is_refused(folder: Path, option: str, value: Any) -> None:
    module = Edited("on_after_backward", mask, lambda network: make_mtadam(network, **{option: value}))
    with pytest.raises(RuntimeError, match=r"p.grad of '2.weight', '2.bias' was changed"):
        fit(module, make_loader())
    assert_same(module.network, make_network())
