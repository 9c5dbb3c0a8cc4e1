"""No operation on the step's path makes the host wait for an accelerator.

The host is told that the CPU's tensors are an accelerator's, and every operation that needs their values on the host is
forbidden. ``low_memory=True`` is exempt: it consumes a gradient for good, so it must know at once that it is finite.
"""

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mtadam import finite, graphs, terms
from lightning_mtadam.optim import accelerate
from tests.lightning_models import make_loader, make_mtadam, make_network, three_losses

aten = torch.ops.aten
DISPATCHED = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten.allclose,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
"""Of these the result, or its shape, is known on the host only when the data have been computed."""
READING = {
    torch.Tensor.tolist,
    torch.Tensor.item,
    torch.Tensor.numpy,
    torch.Tensor.cpu,
    torch.Tensor.__bool__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.__index__,
    torch.Tensor.__array__,
}
"""What reads a tensor past the dispatcher, as it may on a CPU."""


class NoSynchronization(TorchDispatchMode):
    """Forbids operations whose result the host must wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked or func.overloadpacket in DISPATCHED:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


class NoReading(TorchFunctionMode):
    """Forbids what reads values, but of tensors that were made on the host expressly, such as the flag of a step."""

    def __init__(self):
        super().__init__()
        self.host = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READING and not any(args[0] is tensor for tensor in self.host):
            raise AssertionError(f"{func.__name__} makes the host wait")
        result = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("device") == "cpu":
            self.host.append(result)
        return result


class Forbidding:
    """Both."""

    def __init__(self):
        self.reading, self.dispatched = NoReading(), NoSynchronization()

    def __enter__(self):
        self.reading.__enter__()
        self.dispatched.__enter__()

    def __exit__(self, *error):
        self.dispatched.__exit__(*error)
        self.reading.__exit__(*error)


@pytest.fixture
def _accelerator(monkeypatch):
    for module in (finite, graphs, terms):
        monkeypatch.setattr(module, "is_host", lambda device: False)


def forbidding_run(
    clip=None,
    loss_scale=None,
    accumulate=1,
    steps=6,
    changing=False,
    set_importance=False,
    dtype=torch.float64,
    default=None,
    **options,
):
    """Steps of which each part is forbidden to make the host wait."""
    network = make_network(dtype)
    optimizer = make_mtadam(network, terms=("fit", "size", "decay"), **options)
    start = [parameter.detach().clone() for parameter in network.parameters()]
    scale = None if loss_scale is None else torch.tensor(loss_scale)
    forbidding = Forbidding()
    batches = make_loader(steps * accumulate, dtype)
    for index, batch in enumerate(batches):
        losses = three_losses(network, batch)
        if changing and index % 3 == 1:
            del losses["size"]
        with forbidding, default or nullcontext():
            if set_importance:
                optimizer.set_importance({"size": index % 4 / 3})
            if index % accumulate == 0:
                optimizer.zero_grad()
            optimizer.backward(losses, grad_output=scale, loss_scale=scale)
            if (index + 1) % accumulate == 0:
                if clip is not None:
                    optimizer.clip_gradients(*clip)
                optimizer.step()
                optimizer.balance_weights(), optimizer.scales(), optimizer.gradient_norms()
    assert all(not torch.equal(a, b) for a, b in zip(start, network.parameters(), strict=True)), "it has been trained"
    return optimizer


OPTIONS = {
    "default": {},
    "anchor mean": {"anchor": "mean", "importance": {"size": 0.5}, "max_scale": 10.0},
    "anchor unit": {"anchor": "unit", "norm_init": "unbiased"},
    "no anchor": {"anchor": None, "norm_init": "one"},
    "denominator mean": {"denominator": "mean", "update": "mean"},
    "denominator own": {"denominator": "own", "amsgrad": True},
    "denominator sum": {"denominator": "sum", "amsgrad": True},
    "eps=0": {"eps": 0.0, "weight_decay": 0.1, "maximize": True},
    "module": {"layers": "module"},
    "global": {"layers": "global"},
    "skip": {"on_nonfinite": "skip"},
    "light and full steps": {"balance_every": 3, "steps": 14},
    "light and full steps, clipping": {"balance_every": 3, "steps": 14, "clip": (0.01, "norm")},
    "light and full steps, accumulation": {"balance_every": 3, "steps": 14, "accumulate": 2},
    "clipping by norm": {"clip": (0.01, "norm")},
    "clipping by value": {"clip": (0.01, "value")},
    "loss scale": {"loss_scale": 1024.0},
    "accumulation": {"accumulate": 2},
    "terms that come and go": {"changing": True},
    "importance that changes": {"set_importance": True},
    "light steps, importance that changes": {"balance_every": 3, "steps": 14, "set_importance": True},
    "bfloat16": {"dtype": torch.bfloat16, "amsgrad": True},
    "compile": {"compile": True, "amsgrad": True, "weight_decay": 0.1},
    "compile, clipping": {"compile": True, "denominator": "own", "eps": 0.0, "clip": (0.01, "value")},
    "compile, light and full steps": {"compile": True, "balance_every": 3, "steps": 14},
}


@pytest.fixture
def _uncompiled(monkeypatch):
    """What would be compiled runs as it is written: nothing can be compiled under such a mode."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(accelerate, "_kernel", cache(accelerate._kernel.__wrapped__))


@pytest.mark.usefixtures("_accelerator", "_uncompiled")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_host_does_not_wait(name):
    forbidding_run(**OPTIONS[name])


@pytest.mark.usefixtures("_accelerator", "_uncompiled")
@pytest.mark.parametrize("name", ["default", "light and full steps", "compile"])
def test_numbers_of_the_host_stay_there_whatever_the_default_device(name):
    forbidding_run(**OPTIONS[name], default=torch.device("meta"))


def test_on_the_host_itself_the_check_reads_and_is_caught():
    """The control: with ``is_host`` as it is, the flag of each step is read."""
    with pytest.raises(AssertionError, match="makes the host wait"):
        forbidding_run()


READERS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.sum() else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.clone().__setitem__(x > 0, torch.zeros(3)),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("name", READERS)
def test_whatever_reads_values_is_caught(name):
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="makes the host wait"), Forbidding():
        READERS[name](x)
