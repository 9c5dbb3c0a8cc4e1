"""With ``compile=True`` the step is the same, and is compiled once.

Compiling takes seconds, so that most of it is shown of the code that is compiled as it is written, and little compiled.
"""

import copy
import itertools
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from lightning_mtadam.optim import MTAdam, compiled
from tests.optim.streams import SHAPES, feed, make, start, stream

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 2e-3}
LARGE = (45, 50)
"""More than are packed with others."""


@pytest.fixture
def _as_written(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(compiled, "_kernel", cache(compiled._kernel.__wrapped__))


def spread(seed=0):
    """The stream of ``streams`` where terms come and go, with a large parameter behind the others."""
    generator = np.random.default_rng(seed)
    for index, found in enumerate(stream(104, seed)):
        large = {term: generator.normal(size=LARGE) for term in found}
        if index in {*range(10), *range(18, 22), *range(30, 33), *range(100, 104)}:
            yield {term: [*gradients, large[term]] for term, gradients in found.items()}


def run(compile, *, dtype=torch.float64, clip=None, large=True, lr=1e-2, **options):
    """Parameters, moments, norms and clocks after some twenty steps."""
    second_group = {"lr": 3e-3, "weight_decay": 0.2, "betas": (0.8, 0.99, 0.5)}
    parameters, optimizer = make(start(0), dtype=dtype, second_group=second_group, lr=lr, compile=compile, **options)
    if large:
        values = torch.linspace(-1, 1, LARGE[0] * LARGE[1], dtype=torch.float64).reshape(LARGE).to(dtype)
        parameters.append(values.requires_grad_())
        optimizer.add_param_group({"params": [("large", parameters[-1])]})
    for gradients in spread():
        feed(optimizer, parameters, gradients if large else {t: g[: len(SHAPES)] for t, g in gradients.items()})
        if clip is not None:
            optimizer.clip_gradients(*clip)
        optimizer.step()
    tensors = {f"parameter {index}": parameter.detach() for index, parameter in enumerate(parameters)}
    for index, parameter in enumerate(parameters):
        tensors |= {f"{key} {index}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


GRID = list(itertools.product(("max", "mean", "own", "sum"), ("sum", "mean"), (False, True), (1e-8, 0.0)))


@pytest.mark.usefixtures("_as_written")
@pytest.mark.parametrize(("denominator", "update", "amsgrad", "eps"), GRID)
def test_every_combination_equals_the_eager_step(denominator, update, amsgrad, eps):
    options = {"denominator": denominator, "update": update, "amsgrad": amsgrad, "eps": eps}
    for clip in (None, (0.5, "norm"), (0.05, "value")):
        assert_close(run(True, clip=clip, **options), run(False, clip=clip, **options), 1e-12)


@pytest.mark.usefixtures("_as_written")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "options",
    [{"maximize": True}, {"weight_decay": 0.3}, {"rule": "global", "anchor": "mean"}, {"denominator": "own"}],
    ids=lambda options: "-".join(options),
)
def test_other_options_and_dtypes_equal_the_eager_step(options, dtype):
    assert_close(run(True, dtype=dtype, **options), run(False, dtype=dtype, **options), TOLERANCE[dtype])


COMPILED = {
    "float64": {"dtype": torch.float64, "weight_decay": 0.1},
    "float32": {"dtype": torch.float32, "maximize": True, "clip": (0.5, "norm")},
    "bfloat16": {"dtype": torch.bfloat16, "denominator": "mean", "update": "mean", "large": False},
    "own, amsgrad, eps=0, clipping": {
        "denominator": "own", "amsgrad": True, "eps": 0.0, "large": False, "clip": (0.05, "value"),
    },
    "sum": {"dtype": torch.float32, "denominator": "sum", "large": False},
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_what_is_compiled_equals_the_eager_step(name):
    """And nothing is compiled anew where terms come and go."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        ours = run(True, **COMPILED[name])
    assert_close(ours, run(False, **COMPILED[name]), TOLERANCE[COMPILED[name].get("dtype", torch.float64)])


def kernels():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def trained(sizes, lrs, compile=True, dtype=torch.float64):
    parameters = [torch.linspace(0, 1, size, dtype=dtype, requires_grad=True) for size in sizes]
    optimizer = MTAdam(parameters, compile=compile, terms=("a", "b", "c"))
    for lr in lrs:
        optimizer.param_groups[0].update(lr=lr, betas=(0.9 - lr, 0.999 - lr, 0.8 + lr / 2))
        optimizer.zero_grad()
        flat = torch.cat(parameters)
        optimizer.backward({"a": flat.square().sum(), "b": flat.sum(), "c": flat.exp().sum()})
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_other_sizes_learning_rates_betas_and_steps_are_not_compiled_anew():
    trained((4000,), (0.1,))
    trained((5, 7), (0.1,))
    before = kernels()
    with torch._dynamo.config.patch(error_on_recompile=True):
        trained((2049,), (0.1, 0.01, 0.001, 0.0))
        trained((3000, 5000, 100, 3, 2, 1), (0.2, 0.1, 0.3))
        trained((1,), (0.1, 0.2))
        trained((1, 1), (0.1, 0.2))
        trained((0, 2, 1), (0.1, 0.2))
    assert kernels() == before + 5  # one for the tables of each optimizer
    assert before > 0


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(("size", "shared"), [(compiled.SHARED, True), (compiled.SHARED - 1, False)])
def test_threads_share_a_large_block_and_no_other(size, shared):
    compiled._kernel.cache_clear()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        ours, programs = run_and_get_code(trained, (size,), (0.1, 0.2))
    assert any("omp parallel" in program for program in programs) is shared
    (theirs,) = trained((size,), (0.1, 0.2), compile=False)
    torch.testing.assert_close(ours[0], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 1), (1, 3000)])
def test_parameters_of_one_element_equal_the_eager_step(sizes):
    ours = trained(sizes, (0.1, 0.2, 0.1))
    theirs = trained(sizes, (0.1, 0.2, 0.1), compile=False)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [0, 2])
def test_where_nothing_can_be_compiled_it_says_so_and_changes_nothing(step, monkeypatch):
    def failing(*args, **options):
        def raising(*args, **options):
            raise OSError("no compiler")

        return raising

    network = nn.Linear(3, 2)
    optimizer = MTAdam(network.named_parameters(), compile=True, terms=("fit", "size"))

    def advance():
        output = network(torch.ones(4, 3))
        optimizer.zero_grad()
        optimizer.backward({"fit": output.square().mean(), "size": output.abs().mean()})
        optimizer.step()

    monkeypatch.setattr(compiled, "_kernel", cache(compiled._kernel.__wrapped__))
    with monkeypatch.context() as working:
        working.setattr(torch, "compile", lambda function, **options: function)
        for _ in range(step):
            advance()
    compiled._kernel.cache_clear()
    optimizer.param_groups[0]["eps"] = 0.0  # takes a kernel of its own
    monkeypatch.setattr(torch, "compile", failing)
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    with pytest.raises(
        RuntimeError, match=r"torch\.compile cannot compile the update for cpu: no compiler.*compile=True"
    ):
        advance()
    after = network.state_dict(), optimizer.state_dict()
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1]["param_groups"] == before[1]["param_groups"]
    torch.testing.assert_close(after[1]["state"], before[1]["state"], rtol=0, atol=0)


@pytest.mark.usefixtures("_as_written")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"denominator": "own"}])
def test_large_gradients_in_float16_saturate(compile, options):
    """Their squares are beyond its range: an average that became infinite would never move again, or be nan."""
    parameter = torch.ones(4, dtype=torch.float16, requires_grad=True)
    optimizer = MTAdam([parameter], lr=0.25, compile=compile, **options)
    for _ in range(3):
        before = parameter.detach().clone()
        optimizer.zero_grad()
        optimizer.backward({"fit": (parameter * 400).sum()})
        optimizer.step()
        assert bool((parameter < before).all())
        assert bool((parameter > before - 0.5).all())
