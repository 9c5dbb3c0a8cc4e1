"""Lightning Fabric's loop: its wrapped optimizer, its precision, its sharding."""

import inspect

import pytest
import torch
from lightning.fabric import Fabric, wrappers
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn

from lightning_mtadam.lightning_internals import as_fabric_backward
from lightning_mtadam.optim import MTAdam
from tests.distributed.ranks import results, run_ranks
from tests.distributed.sharded import (
    RANKS,
    TERMS,
    Network,
    batches,
    difference,
    losses_of,
    needs_fsdp2,
    shard,
    train_rows,
    wholes,
)
from tests.lightning_models import assert_same, assert_same_state, make_mtadam

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


def set_up(network, optimizer, **options):
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    return (fabric, *fabric.setup(network, optimizer))


def public_methods():
    mine = [name for base in MTAdam.__mro__[:5] for name in vars(base) if not name.startswith("_")]
    return {*mine, "state_dict"}


def use_everything(optimizer, network, model):
    """Call every public method of the optimizer.

    Returns:
        The names of those that were called, and what they returned.
    """
    batch = next(batches(None))
    optimizer.name_parameters(network.named_parameters())
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.1})
    optimizer.backward({**losses_of(model, batch), "fit": extra.square().sum()}, model=model)
    optimizer.zero_grad()
    optimizer.skip_step()
    optimizer.step()
    for _ in range(3):
        optimizer.backward({**losses_of(model, batch), "fit": extra.square().sum()}, model=model)
        optimizer.clip_gradients(0.1)
        held = optimizer.held()
        optimizer.step()
    optimizer.synchronize()
    optimizer.set_importance({"fit": 0.5})
    saved = optimizer.state_dict()
    train_rows(network, optimizer, None, steps=1)
    optimizer.load_state_dict(saved)
    names = ("average_weights", "balance_weights", "gradient_norms", "layer_sizes", "scales", "term_weights")
    read = {name: getattr(optimizer, name)() for name in names}
    read |= {"held": held[1], "consumes_at_once": torch.tensor(optimizer.consumes_at_once)}
    called = {"name_parameters", "add_param_group", "backward", "zero_grad", "skip_step", "step", "clip_gradients"}
    return called | read.keys() | {"synchronize", "set_importance", "state_dict", "load_state_dict", "terms"}, read


def test_every_method_works_through_fabrics_wrapper():
    """It has the class of the optimizer but not its attributes: none may be set on it."""
    networks = Network(), Network()
    bare, inner = (make_mtadam(network, terms=TERMS) for network in networks)
    _, model, wrapped = set_up(networks[1], inner)
    before = set(vars(wrapped))
    called, expected = use_everything(bare, networks[0], networks[0])
    _, found = use_everything(wrapped, networks[1], model)
    assert called == public_methods()
    assert set(vars(wrapped)) == before
    assert_same(*networks)
    assert_same_state(bare, inner)
    assert wrapped.terms == bare.terms
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_close_to_float32(precision):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision == "16-mixed" else None
    network, exact = Network(dtype=torch.float32), Network(dtype=torch.float32)
    fabric, model, optimizer = set_up(
        network, make_mtadam(network), plugins=MixedPrecision(precision, "cpu", scaler=scaler)
    )
    for batch in batches(None, dtype=torch.float32):
        scale = None if scaler is None else fabric.strategy.precision.scaler.scale(torch.ones(()))
        optimizer.backward(losses_of(model, batch), model=model, grad_output=scale, loss_scale=scale)
        optimizer.clip_gradients(0.1)
        optimizer.step()
        optimizer.zero_grad()
    train_rows(exact, make_mtadam(exact), None, clip=(0.1, "norm"))
    assert 0 < difference(wholes(network), wholes(exact)) < 3e-3


def test_only_our_own_backward_counts_as_fabrics():
    """The private flag is there, and is put back."""
    assert inspect.getsource(wrappers._backward_hook).count("_in_fabric_backward") == 1
    with as_fabric_backward():
        assert wrappers._in_fabric_backward
    assert not wrappers._in_fabric_backward
    with pytest.raises(KeyError), as_fabric_backward():
        raise KeyError
    assert not wrappers._in_fabric_backward


def sharded(rank, path):
    """Accumulates; saves after the first epoch, goes on, and goes on again from what was saved."""
    fabric = Fabric(
        accelerator="cpu",
        devices=RANKS,
        strategy=ModelParallelStrategy(lambda network, mesh: shard(network, mesh["data_parallel"]), RANKS, 1),
    )
    fabric.launch()
    found = []
    for load in (False, True):
        model = fabric.setup_module(Network())
        optimizer = fabric.setup_optimizers(make_mtadam(model, terms=TERMS))
        if load:
            fabric.load(path, {"model": model, "optimizer": optimizer})
        for epoch in range(load, 2):
            for index, batch in enumerate(batches(rank)):
                last = index % 3 == 2
                with fabric.no_backward_sync(model, enabled=not last):
                    losses = {name: loss / 3 for name, loss in losses_of(model, batch).items()}
                    optimizer.backward(losses, model=model)
                if last:
                    optimizer.clip_gradients(0.05)
                    optimizer.step()
                    optimizer.zero_grad()
            if epoch == 0:
                fabric.save(path, {"model": model, "optimizer": optimizer})
        found.append(wholes(model.module))
    return found


@needs_fsdp2
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_sharded_by_fabric_equals_one_process(tmp_path):
    network = Network()
    optimizer = make_mtadam(network)
    for _ in range(2):
        train_rows(network, optimizer, None, accumulate=3, clip=(0.05, "norm"))
    for straight, resumed in results(run_ranks(sharded, tmp_path, str(tmp_path / "checkpoint"))):
        assert difference(straight, wholes(network)) < 1e-12
        assert difference(resumed, straight) == 0
