"""Faster ways to the same numbers: torch's own fused Adam on a CPU, and ``torch.compile``. Nothing depends on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache, partial
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_mtadam import terms
from lightning_mtadam.optim import algorithm
from lightning_mtadam.optim.chunks import Chunk, Coefficients, Moments, Numbers
from lightning_mtadam.optim.options import Denominator, Options
from lightning_mtadam.optim.tables import Tables

_T = TypeVar("_T")
Rows: TypeAlias = Sequence[Tensor]
Update: TypeAlias = Callable[..., None]  # as algorithm.update, but gradients may be left times their scales

TRIAL = 67  # elements of the chunk on which a kernel is compiled; those of later chunks are free, above one
SHARED = 1 << 15  # elements of a chunk that threads share, by a kernel of its own: torch would decide by the trial's
STANDING = 1 - 2**-53  # the decay of an average that stands still: with one itself, Adam would divide by zero
LONG_AGO = torch.tensor(math.inf, device="cpu")  # the number of steps, as Adam is told: it finds no bias to correct


def faster(chunk: Chunk, numbers: Numbers, options: Options) -> Update | None:
    """What updates the chunk faster than ``algorithm.update``; ``None`` if nothing does. Raises if it can't compile."""
    if options.compile and chunk.size > chunk.block:  # a kernel whose size is free takes two and more
        return partial(_run, _kernel(_case_of(chunk, numbers)))
    return fused_update if fused_applies(chunk, numbers) else None


def fused_applies(chunk: Chunk, numbers: Numbers) -> bool:
    """Whether torch's fused Adam can update the chunk: not where coefficients differ from element to element."""
    assert chunk.gradients is not None
    return bool(
        _suits_fused(numbers.denominator, chunk.gradients.device, chunk.gradients.dtype)
        and not chunk.packed
        and not chunk.moment_rows.largest
        and numbers.skipped is None
        and numbers.eps >= torch.finfo(chunk.gradients.dtype).tiny  # or 0 / 0 would be a nan
    )


def fused_update(
    parameter: Tensor,
    total: Tensor,
    gradients: Rows,
    moments: Moments,
    local: Coefficients,
    numbers: Numbers,
    scratch: Tensor,
) -> None:
    """As ``algorithm.update``, by torch's fused Adam: one call for each term, and one that moves the parameters.

    What Adam's kernel does for the gradient of one term is MTAdam's share of that term, but for the first moment:

    - its average of the squares, with the decay ``1 - w`` in place of beta2, is the term's ``v^_i``;
    - its amsgrad, over memory that begins at zero, keeps the largest of the averages of the terms so far;
    - with a learning rate of zero it leaves a parameter where it is; it works on memory for results.

    In the last call ``total`` is the gradient, and what is kept of those squares does not move any more.
    """
    largest, spare = scratch
    decays = [1 - weight for weight in local.weights[:, 0].tolist()]
    divisors, rest = list(moments.second), {"eps": numbers.eps, "maximize": False}
    if numbers.denominator == "max":
        largest.zero_()
        spare.zero_()
        for (gradient, divisor), square, beta2 in zip(_balanced(gradients, local), moments.second, decays, strict=True):
            if beta2 < 1:  # else neither gradient nor moment was ever anything but zero
                lists = ([spare], [gradient], [spare], [square], [largest], [LONG_AGO])
                none = {"lr": 0.0, "beta1": 0.0, "beta2": beta2, "weight_decay": 0.0, "amsgrad": True, **rest}
                torch._fused_adamw_(*lists, grad_scale=divisor, **none)
        divisors, decays = [largest], [STANDING]
        total = torch.div(total, len(gradients), out=spare)
    lr = numbers.lr / float(local.factor)
    decay = (1 - numbers.decay) / lr if lr and numbers.decay is not None else 0.0
    lists = ([parameter], [total], [moments.first[0]], divisors, [], [LONG_AGO])
    betas = {"beta1": 1 - numbers.share, "beta2": min(decays[0], STANDING)}
    torch._fused_adamw_(*lists, lr=lr, weight_decay=decay, amsgrad=False, **betas, **rest)  # type: ignore[call-overload]


def _suits_fused(denominator: Denominator, device: torch.device, dtype: torch.dtype) -> bool:
    """It takes numbers that are known on the host."""
    return denominator in ("max", "sum") and terms.is_host(device) and dtype in (torch.float32, torch.float64)


def _balanced(gradients: Rows, local: Coefficients) -> Iterable[Any]:
    """The balanced gradients, [b] each, with what the kernel is still to divide them by: it does so in fp32 only."""
    assert local.scales is not None
    scales = local.scales[:, 0]
    if scales.dtype != torch.float32:
        return [(gradient.mul_(scale), None) for gradient, scale in zip(gradients, scales, strict=True)]
    return zip(gradients, scales.reciprocal(), strict=True)


class Case(NamedTuple):
    """What tells one compiled kernel from another; all other numbers are free."""

    terms: int  # whose gradients it takes
    moments: tuple[int, ...]  # how many of each
    dtype: torch.dtype
    device: torch.device
    numbers: Numbers  # with ones in place of what is free, and whether it is known that nothing is skipped
    packed: bool
    block: int
    threads: int
    shared: bool  # whether threads share a chunk


def _case_of(chunk: Chunk, numbers: Numbers) -> Case:
    """The case of a chunk; those that come later must lie in the same memory."""
    assert chunk.gradients is not None
    threads, device = torch.get_num_threads(), chunk.gradients.device
    free = [None if one is None else 1.0 for one in numbers[:4]]
    kind = Numbers._make((*free, numbers.denominator, numbers.no_eps, numbers.skipped is None))
    shared = not chunk.packed and threads > 1 and terms.is_host(device) and chunk.size >= SHARED
    count = 0 if numbers.denominator == "sum" else len(chunk.gradients)
    moments = tuple(map(len, chunk.moment_rows))
    return Case(count, moments, chunk.gradients.dtype, device, kind, chunk.packed, chunk.block, threads, shared)


@cache
def _kernel(case: Case) -> Update:
    """A kernel of its own for each case, compiled on zeros before any number of a training depends on it."""
    function = _with_own_code(algorithm.update, f"update_{case.terms}_terms")
    kernel: Update = torch.compile(function, fullgraph=True, dynamic=False, options=_options(case.shared))
    wide = torch.promote_types(case.dtype, torch.float32)

    blocks = () if case.block == 1 else (case.block,)

    def zeros(rows: int) -> tuple[Tensor, ...]:
        made = tuple(torch.zeros(TRIAL, *blocks, dtype=case.dtype, device=case.device) for _ in range(rows))
        for row in made:
            torch._dynamo.maybe_mark_dynamic(row, 0)
        return made

    def ones(rows: int) -> Tensor | None:
        shape = (TRIAL, *[1 for _ in blocks]) if case.packed else (1,)
        made = torch.ones(rows, *shape, dtype=wide, device=case.device)
        if case.packed:
            torch._dynamo.maybe_mark_dynamic(made, 1)
        return made if rows else None

    (first, second, largest), denominator = case.moments, case.numbers.denominator
    rows = (case.terms, second, case.terms if denominator == "own" else 1, int(denominator == "mean"), largest)
    local = Coefficients(*map(ones, rows))  # type: ignore[arg-type]
    flag = None if case.numbers.skipped else torch.zeros((), dtype=torch.bool, device=case.device)
    numbers = _as_tensors(case.numbers._replace(skipped=flag), wide)
    try:
        kernel(*zeros(2), zeros(case.terms), Moments(*map(zeros, (first, second, largest))), local, numbers, None)
    except Exception as error:
        raise _refusal(case.device, error) from error
    return kernel


def _run(
    kernel: Update,
    parameter: Tensor,
    total: Tensor,
    gradients: Rows,
    moments: Moments,
    local: Coefficients,
    numbers: Numbers,
    _: None,
) -> None:
    used = local if moments.largest else local._replace(correction=None)
    contiguous = Coefficients(*[None if one is None else one.contiguous() for one in used])  # type: ignore[arg-type]
    kernel(parameter, total, gradients, moments, contiguous, _as_tensors(numbers, local.weights.dtype), None)


def _as_tensors(numbers: Numbers, dtype: torch.dtype) -> Numbers:
    """As tensors, so that another learning rate is no reason to compile anew; on the host, where they are known."""
    lr, share, eps, decay = _scalars(numbers[:4], dtype)
    return numbers._replace(lr=lr, share=share, eps=eps, decay=decay)


@lru_cache(maxsize=64)  # they are the same for all chunks of a group
def _scalars(values: tuple[float | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if value is None else torch.tensor(value, dtype=dtype, device="cpu") for value in values]


def _options(shared: bool) -> dict[str, Any]:
    """What ``torch.compile`` is told: threads for any size, no checks before a call, which would find nothing."""
    skip = getattr(torch.compiler, "skip_all_guards_unsafe", None)
    unguarded = {} if skip is None else {"guard_filter_fn": skip}
    return {**unguarded, "cpp.min_chunk_size": 0} if shared else unguarded


class CompiledTables:
    """What a step does to the tables, as few calls in place of some hundred operations."""

    def __init__(self, tables: Tables) -> None:
        self.weighed = _compiled(tables, Tables.weighed)
        self.measured = _compiled(tables, Tables.measured)
        self.light = _compiled(tables, Tables.light)


def _compiled(tables: Tables, method: Callable[..., _T]) -> Callable[..., _T]:
    """The method as a program for each number of threads: torch refuses more than a few of the same code."""

    @cache
    def program(threads: int) -> Callable[..., _T]:
        return torch.compile(_with_own_code(method, method.__name__), fullgraph=True, dynamic=False)

    def call(observed: Tensor, *arguments: Tensor | None) -> _T:
        try:
            return program(torch.get_num_threads())(tables, observed, *arguments)
        except Exception as error:
            raise _refusal(observed.device, error) from error

    return call


def _with_own_code(function: Callable[..., _T], name: str) -> Callable[..., _T]:
    """The same function with code of its own, by which torch keeps, and counts, what was compiled."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(co_name=name), function.__globals__)


def _refusal(device: torch.device, error: Exception) -> RuntimeError:
    """What to raise where nothing can be compiled."""
    return RuntimeError(
        f"torch.compile cannot compile the update for {device}: {error}. Nothing was changed. On a CPU it needs a"
        " C++ compiler such as g++; or leave out compile=True."
    )
