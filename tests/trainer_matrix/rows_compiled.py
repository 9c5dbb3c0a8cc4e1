"""What rebuilds the graph: compilers and activation checkpointing."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from tests.lightning_models import (
    Regression,
    assert_same,
    fit,
    largest_difference,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
)
from tests.loops import by_hand
from tests.trainer_matrix.table import HAND_LOOP, REFUSED, row

GROUP = "Graphs"


@row(
    GROUP,
    "`torch.compile` of the module or a network in it (eager, aot_eager, inductor)",
    HAND_LOOP,
    cases=[("eager", "module"), ("eager", "network"), ("aot_eager", "module"), ("inductor", "network")],
)
def a_compiled_module_trains_the_same(folder: Path, backend: str, part: str) -> None:
    torch.compiler.reset()
    module = Regression()
    if part == "network":
        module.network.compile(backend=backend)
    trainer = fit(torch.compile(module, backend=backend) if part == "module" else module, make_loader())
    network, optimizer = by_hand()
    assert largest_difference(module.network, network) < 1e-12
    assert list(trainer.optimizers[0].balance_weights()) == list(optimizer.balance_weights())


def one_loss_at_first(network, batch):
    losses = three_losses(network, batch)
    return losses if batch[0][0, 0] != next(iter(make_loader()))[0][0, 0] else {"fit": losses["fit"]}


class OneLossAtFirst(Regression):
    """Has a single term in the first batch of an epoch."""

    def __init__(self) -> None:
        super().__init__(with_terms)
        self.network.compile(backend="aot_eager")

    def training_step(self, batch, batch_idx):
        return one_loss_at_first(self.network, batch)


def with_terms(network):
    return make_mtadam(network, terms=("fit", "size", "decay"))


@row(
    "Refused",
    "`torch.compile` with one term at first and more later (by torch, without"
    " `torch._functorch.config.donated_buffer = False`)",
    REFUSED,
)
def more_terms_than_a_compiled_network_began_with_need_a_setting(folder: Path) -> None:
    torch.compiler.reset()
    module = OneLossAtFirst()
    if torch.__version__.startswith("2.6."):  # which finds no buffer here to donate, and goes on
        needs_setting = contextlib.nullcontext()
    else:
        needs_setting = pytest.raises(RuntimeError, match=r"set torch\._functorch\.config\.donated_buffer=False")
    with needs_setting:
        fit(module, make_loader())
    torch.compiler.reset()
    module = OneLossAtFirst()
    with functorch_config.patch(donated_buffer=False):
        fit(module, make_loader())
    assert largest_difference(module.network, by_hand(with_terms, losses=one_loss_at_first)[0]) < 1e-12


class Checkpointed(Regression):
    """Keeps none of its network's activations."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.forwards, forward = 0, self.network.forward

        def counted(x):
            self.forwards += 1
            return forward(x)

        self.network.forward = lambda x: checkpoint(counted, x.requires_grad_(), use_reentrant=reentrant)


@row(GROUP, "activation checkpointing, `use_reentrant=False`", HAND_LOOP)
def activations_may_be_computed_anew(folder: Path) -> None:
    module = Checkpointed(reentrant=False)
    fit(module, make_loader())
    assert_same(module.network, by_hand()[0])
    assert module.forwards > 12


@row("Refused", "reentrant activation checkpointing", REFUSED)
def reentrant_checkpointing_is_refused_naming_the_loss(folder: Path) -> None:
    module = Checkpointed(reentrant=True)
    with pytest.raises(ValueError, match=r"losses\['fit'\] passes through reentrant .*use_reentrant=False"):
        fit(module, make_loader())
    assert_same(module.network, make_network())
