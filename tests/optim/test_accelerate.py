"""What is faster gives the same numbers: torch's fused Adam, and ``compile=True``, which compiles once.

Compiling takes seconds, so that most of it is shown of the code that is compiled as it is written, and little compiled:
little of that in the quick run.
"""

import copy
import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch._inductor.utils import run_and_get_code

from lightning_mtadam import MTAdam
from lightning_mtadam.layout import Place
from lightning_mtadam.optim import accelerate, algorithm, update
from lightning_mtadam.optim.chunks import Chunk, Coefficients, Moments, Numbers
from lightning_mtadam.optim.options import Options
from tests.loops import parameters_in, take_step, train
from tests.optim.streams import LENGTH, SHAPES, feed, make, start, stream

CLOSE = {torch.float32: 1e-6, torch.float64: 1e-13}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 2e-3}
LARGE = (45, 50)
"""More than are packed with others."""


# Torch's fused Adam, one call a term


NUMBERS = Numbers(lr=0.01, share=0.1, eps=1e-8, decay=None, denominator="max", no_eps=False, skipped=None)


def column(values, dtype):
    return torch.tensor(values, dtype=dtype)[:, None]


def random_chunk(terms, squares, reached, dtype, size, generator):
    """Random parameters, gradients, moments and coefficients; nothing where a term never reached."""
    mask = column([float(flag) for flag in reached], dtype)
    parameter = torch.randn(size, dtype=dtype, generator=generator)
    gradients = torch.randn(terms, size, dtype=dtype, generator=generator) * mask
    kept = mask if squares == terms else torch.ones(1, 1, dtype=dtype)
    second = torch.rand(squares, size, dtype=dtype, generator=generator) * kept
    first = torch.randn(1, size, dtype=dtype, generator=generator) * float(any(reached))
    scales = torch.rand(terms, 1, dtype=dtype, generator=generator) + 0.1
    weights = 0.001 + 0.5 * torch.rand(squares, 1, dtype=dtype, generator=generator)
    local = Coefficients(scales, weights * kept, torch.full((1, 1), 0.7, dtype=dtype), None, None)
    place = Place.of(parameter, 1)
    return Chunk((0,), (parameter,), (place,), 0, 0, 0, size, gradients, (first, second), {}, 0, None), local


def arguments(chunk, local, numbers):
    """Of an update, with memory of their own; the balanced gradient is not quite the sum of the terms'."""
    gradients = [row.clone() for row in chunk.gradient_rows]
    total = algorithm.balance(gradients, local.scales, torch.empty_like(gradients[0])) * 0.75
    if numbers.denominator == "sum":
        gradients, local = [], local._replace(scales=None)
    moments = Moments(*[[row.clone() for row in rows] for rows in chunk.moment_rows])
    scratch = torch.full((2, chunk.size), torch.nan, dtype=chunk.gradients.dtype)
    return chunk.parameters[0].clone(), total, gradients, moments, local, numbers, scratch


@example(seed=0, reached=[False], denominator="sum", dtype=torch.float32, beta1=0.0, lr=0.01, decay=None, size=1)
@given(
    seed=st.integers(0, 10_000),
    reached=st.lists(st.booleans(), min_size=1, max_size=12),
    denominator=st.sampled_from(["max", "sum"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    lr=st.sampled_from([0.0, 0.01, -0.01]),
    decay=st.sampled_from([None, 0.99]),
    size=st.integers(1, 67),
)
def test_a_call_a_term_equals_operation_by_operation(seed, reached, denominator, dtype, beta1, lr, decay, size):
    generator = torch.Generator().manual_seed(seed)
    squares = 1 if denominator == "sum" else len(reached)
    chunk, local = random_chunk(len(reached), squares, reached, dtype, size, generator)
    decay = decay if lr or decay is None else 1.0  # as of a group whose rate is zero
    changes = {"lr": lr, "share": 1 - beta1, "decay": decay, "denominator": denominator}
    numbers = NUMBERS._replace(**changes)
    expected, ours = arguments(chunk, local, numbers), arguments(chunk, local, numbers)
    algorithm.update(*expected)
    assert accelerate.fused_applies(chunk, numbers)
    accelerate.fused_update(*ours)
    close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype]}
    torch.testing.assert_close(ours[0], expected[0], **close)
    for rows, others in zip(ours[3], expected[3], strict=True):
        torch.testing.assert_close(rows, others, **close)


@pytest.mark.parametrize(
    "change",
    [{"eps": 0.0}, {"skipped": torch.tensor(False)}, {"denominator": "own"}, {"denominator": "mean"}],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_what_adams_kernel_cannot_do_is_left_to_the_algorithm(change):
    chunk, _ = random_chunk(2, 2, [True, True], torch.float32, 3, torch.Generator())
    options = Options(denominator=change.get("denominator", "max"))
    assert accelerate.fused_applies(chunk, NUMBERS)
    assert accelerate.faster(chunk, NUMBERS, Options()) is accelerate.fused_update
    others = {
        "numbers": (chunk, NUMBERS._replace(**change)),
        "pack": (replace(chunk, members=(0, 1)), NUMBERS),
        "narrow": (replace(chunk, gradients=chunk.gradients.bfloat16()), NUMBERS),
        "elsewhere": (replace(chunk, gradients=chunk.gradients.to("meta")), NUMBERS),
        "amsgrad": (replace(chunk, moments=(*chunk.moments, chunk.moments[1])), NUMBERS),
    }
    for name, case in others.items():
        assert not accelerate.fused_applies(*case), name
        assert accelerate.faster(*case, options) is None, name


def test_chunks_give_what_the_whole_gives(monkeypatch):
    def parameter_after():
        generator = torch.Generator().manual_seed(0)
        parameter = torch.randn(5003, generator=generator, dtype=torch.float64).requires_grad_()
        directions = torch.randn(5, 3, 5003, generator=generator, dtype=torch.float64)
        losses = ({f"term{i}": (one * parameter).sum() for i, one in enumerate(found)} for found in directions)
        train(MTAdam([parameter], lr=0.01), losses)
        return parameter.detach()

    whole = parameter_after()
    monkeypatch.setattr(update, "BLOCK", 1000)
    torch.testing.assert_close(parameter_after(), whole, rtol=1e-13, atol=1e-13)


# compile=True


@pytest.fixture
def _as_written(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(accelerate, "_kernel", cache(accelerate._kernel.__wrapped__))


def spread(seed=0):
    """The stream of ``streams`` where terms come and go, with a large parameter behind the others."""
    generator = np.random.default_rng(seed)
    for index, found in enumerate(stream(LENGTH, seed)):
        large = {term: generator.normal(size=LARGE) for term in found}
        if index in {*range(10), *range(18, 22), *range(30, 33), *range(52, 56)}:
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
    "float32": {"dtype": torch.float32, "weight_decay": 0.1, "maximize": True, "clip": (0.5, "norm")},
    "bfloat16": {"dtype": torch.bfloat16, "denominator": "mean", "update": "mean", "large": False},
    "own, amsgrad, eps=0, clipping": {
        "denominator": "own", "amsgrad": True, "eps": 0.0, "large": False, "clip": (0.05, "value"),
    },
    "sum": {"dtype": torch.float64, "denominator": "sum", "large": False},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "float32")) for name in COMPILED]
)
def test_what_is_compiled_equals_the_eager_step(name):
    """And nothing is compiled anew where terms come and go."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        ours = run(True, **COMPILED[name])
    assert_close(ours, run(False, **COMPILED[name]), TOLERANCE[COMPILED[name].get("dtype", torch.float64)])


def kernels():
    """How many programs were compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def trained_on(sizes, lrs, compile=True, dtype=torch.float64):
    """Parameters of these sizes after a step at each of the rates, with other betas each time."""
    parameters = [torch.linspace(0, 1, size, dtype=dtype, requires_grad=True) for size in sizes]
    optimizer = MTAdam(parameters, compile=compile, terms=("a", "b", "c"))
    for lr in lrs:
        optimizer.param_groups[0].update(lr=lr, betas=(0.9 - lr, 0.999 - lr, 0.8 + lr / 2))
        flat = torch.cat(parameters)
        take_step(optimizer, {"a": flat.square().sum(), "b": flat.sum(), "c": flat.exp().sum()})
    return [parameter.detach() for parameter in parameters]


@pytest.mark.slow
def test_other_sizes_learning_rates_betas_and_steps_are_not_compiled_anew():
    trained_on((4000,), (0.1,))
    trained_on((5, 7), (0.1,))
    before = kernels()
    with torch._dynamo.config.patch(error_on_recompile=True):
        trained_on((2049,), (0.1, 0.01, 0.001, 0.0))
        trained_on((3000, 5000, 100, 3, 2, 1), (0.2, 0.1, 0.3))
        trained_on((1,), (0.1, 0.2))
        trained_on((1, 1), (0.1, 0.2))
        trained_on((0, 2, 1), (0.1, 0.2))
    assert kernels() == before + 10  # two for the tables of each optimizer
    assert before > 0


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(("size", "shared"), [(accelerate.SHARED, True), (accelerate.SHARED - 1, False)])
def test_threads_share_a_large_chunk_and_no_other(size, shared):
    accelerate._kernel.cache_clear()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        ours, programs = run_and_get_code(trained_on, (size,), (0.1, 0.2))
    assert any("omp parallel" in program for program in programs) is shared
    (theirs,) = trained_on((size,), (0.1, 0.2), compile=False)
    torch.testing.assert_close(ours[0], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_as_written", "_two_threads")
def test_another_number_of_threads_takes_another_kernel(monkeypatch):
    kernel, asked = accelerate._kernel, []
    monkeypatch.setattr(accelerate, "_kernel", lambda case: asked.append(case.threads) or kernel(case))
    parameter = torch.ones(5, requires_grad=True)
    optimizer = MTAdam([parameter], compile=True)
    for threads in (2, 1, 1, 2):
        torch.set_num_threads(threads)
        take_step(optimizer, losses_of(parameter))
    assert asked == [2, 1], "one for each number, which is kept"


@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 1), (1, 3000)])
def test_parameters_of_one_element_equal_the_eager_step(sizes):
    ours = trained_on(sizes, (0.1, 0.2, 0.1))
    theirs = trained_on(sizes, (0.1, 0.2, 0.1), compile=False)
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
        take_step(optimizer, {"fit": output.square().mean(), "size": output.abs().mean()})

    monkeypatch.setattr(accelerate, "_kernel", cache(accelerate._kernel.__wrapped__))
    with monkeypatch.context() as working:
        working.setattr(torch, "compile", lambda function, **options: function)
        for _ in range(step):
            advance()
    accelerate._kernel.cache_clear()
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
        take_step(optimizer, {"fit": (parameter * 400).sum()})
        assert bool((parameter < before).all())
        assert bool((parameter > before - 0.5).all())


def losses_of(*parameters):
    flat = torch.cat([parameter.double().flatten() for parameter in parameters])
    return {"fit": (flat - 1).square().sum(), "size": 3 * flat.exp().sum(), "wave": flat.sin().abs().sum()}


def test_more_numbers_of_threads_than_torch_keeps_programs_of_one_function():
    real = torch.compile
    threads = torch.get_num_threads()
    parameter = torch.ones(1, requires_grad=True)  # only the tables are compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: real(function, backend="eager", fullgraph=True))
        optimizer = MTAdam([parameter], compile=True)
        try:
            for count in range(1, torch._dynamo.config.recompile_limit + 3):
                torch.set_num_threads(count)
                take_step(optimizer, losses_of(parameter))
        finally:
            torch.set_num_threads(threads)
    assert optimizer.param_groups[0]["steps"] == torch._dynamo.config.recompile_limit + 2


@pytest.mark.slow
def test_compiled_training_continues_bit_for_bit_from_any_step():
    """Light steps too: in fp32 the last digit of a compiled scale may be another than that of an eager one."""

    def made():
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.randn(size, generator=generator).requires_grad_() for size in ((7,), (5, 3), (60, 50))]
        return MTAdam(parameters, compile=True, balance_every=10)

    optimizer, resumed = made(), made()
    for _ in range(30):
        take_step(optimizer, losses_of(*parameters_in(optimizer)))
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        ours, theirs = (one._updater().tables.frozen_scales for one in (resumed, optimizer))
        assert torch.equal(ours, theirs)


# Without any of it


@pytest.mark.parametrize(("ways", "fused"), [(("_apart",), True), (("_apart", "_plain"), False), ((), False)])
def test_the_ways_in_which_the_laws_are_run_are_what_they_are_called(request, monkeypatch, ways, fused):
    calls = []
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *lists, **numbers: calls.append(lists))
    for way in ways:
        request.getfixturevalue(way)
    parameters = [torch.ones(3, requires_grad=True) for _ in range(2)]
    take_step(MTAdam(parameters), losses_of(*parameters))
    assert bool(calls) is fused


@pytest.mark.parametrize("denominator", ["max", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_nothing_accelerated_a_training_is_the_same(request, dtype, denominator):
    def tensors_after():
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in ((7,), (60, 50))]
        optimizer = MTAdam(parameters, lr=0.01, weight_decay=0.1, denominator=denominator)
        train(optimizer, (losses_of(*parameters) for _ in range(20)))
        return [*parameters, *(value for state in optimizer.state.values() for value in state.values())]

    request.getfixturevalue("_apart")
    fast = tensors_after()
    request.getfixturevalue("_plain")
    for one, other in zip(fast, tensors_after(), strict=True):
        torch.testing.assert_close(one, other, rtol=100 * CLOSE[dtype], atol=10 * CLOSE[dtype])
