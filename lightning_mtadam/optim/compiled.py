"""The update as one compiled kernel over all terms: every number is read and written once.

The same mathematics as ``kernels.update``, written row by row, which ``torch.compile`` joins to a single loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial, reduce
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_mtadam.optim import kernels
from lightning_mtadam.optim.finite import is_host
from lightning_mtadam.optim.kernels import Coefficients, Hyperparameters, Moments, Update
from lightning_mtadam.optim.options import Denominator

_T = TypeVar("_T")

TRIAL = 67
"""Elements of the block on which a kernel is compiled; those of later blocks are free, above one."""
SHARED = 1 << 15
"""Elements of a block that several threads share. It has a kernel of its own: torch would decide by the trial's."""


def updater(gradients: Tensor, moments: Moments, hyper: Hyperparameters, *, packed: bool) -> Update:
    """What updates a block as ``kernels.update`` does; compiled here, if it is the first of its kind.

    Args:
        gradients: [I, b], the block's, b of at least two: those that come later must lie in the same memory.
        moments: of the block, likewise.
        hyper: the numbers of its group.
        packed: whether coefficients differ from element to element.

    Raises:
        RuntimeError: torch.compile does not work here.
    """
    threads = torch.get_num_threads()
    kernel = _kernel(
        len(gradients),
        len(moments.exp_avg_sq),
        gradients.dtype,
        torch.promote_types(gradients.dtype, torch.float32),
        gradients.device,
        hyper.denominator,
        moments.max_exp_avg_sq is not None,
        hyper.clip_value is not None,
        hyper.eps == 0,
        hyper.finite is not None,
        packed,
        threads,
        not packed and threads > 1 and is_host(gradients.device) and gradients.shape[1] >= SHARED,
    )
    return partial(_run, kernel, (gradients.unbind(), *moments.rows))


def _run(
    kernel: Callable[..., None],
    rows: Sequence[Sequence[Tensor]],
    parameter: Tensor,
    gradients: Tensor,
    moments: Moments,
    local: Coefficients,
    hyper: Hyperparameters,
    scratch: Tensor,
) -> None:
    kernel(parameter, *rows, *_contiguous(local), *_numbers(hyper, local.scales.dtype), hyper.finite)


def _contiguous(local: Coefficients) -> list[Tensor | None]:
    found = (local.scales, local.weights, local.factor, local.reaching, local.correction)
    return [None if coefficient is None else coefficient.contiguous() for coefficient in found]


def _numbers(hyper: Hyperparameters, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As tensors, so that another learning rate is no reason to compile anew; on the host, where they are known."""
    return _as_tensors((hyper.lr, 1 - hyper.beta1, hyper.eps, hyper.clip_value or 0.0, hyper.decay), dtype)


@lru_cache(maxsize=64)  # they are the same for all blocks of a group
def _as_tensors(numbers: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.tensor(numbers, dtype=dtype, device="cpu").unbind()


def _update_rows(
    parameter: Tensor,
    gradients: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    max_exp_avg_sq: Sequence[Tensor],
    scales: Tensor,
    weights: Tensor,
    factor: Tensor,
    reaching: Tensor | None,
    correction: Tensor | None,
    lr: Tensor,
    share: Tensor,
    eps: Tensor,
    limit: Tensor,
    decay: Tensor,
    finite: Tensor | None,
    *,
    dtype: torch.dtype,
    denominator: Denominator,
    clips: bool,
    no_eps: bool,
) -> None:
    balanced = [gradient.to(dtype) * scale for gradient, scale in zip(gradients, scales.unbind(), strict=True)]
    if finite is not None:
        balanced = [torch.where(finite, row, 0) for row in balanced]
        share, decay = torch.where(finite, share, 0.0), torch.where(finite, decay, 1.0)
    if clips:
        total = reduce(torch.add, balanced)
        ratio = torch.where(total.abs() > limit, limit / total.abs(), 1)
        balanced = [row * ratio for row in balanced]
    steps = balanced if denominator == "own" else [reduce(torch.add, balanced)]
    if denominator == "sum":
        balanced = steps
    merged = len(exp_avg) / len(exp_avg_sq)
    first = [_towards(row.to(dtype), step * merged, share) for row, step in zip(exp_avg, steps, strict=True)]
    second = [
        _towards(row.to(dtype), one * one, weight)
        for row, one, weight in zip(exp_avg_sq, balanced, weights.unbind(), strict=True)
    ]
    for row, value in zip((*exp_avg, *exp_avg_sq), (*first, *second), strict=True):
        kernels.store(value, row)
    if correction is not None:
        found = [value * part for value, part in zip(second, correction.unbind(), strict=True)]
        if finite is not None:
            found = [torch.where(finite, row, 0) for row in found]
        second = [torch.maximum(row.to(dtype), value) for row, value in zip(max_exp_avg_sq, found, strict=True)]
        for row, value in zip(max_exp_avg_sq, second, strict=True):
            kernels.store(value, row)
        second = [value / part for value, part in zip(second, correction.unbind(), strict=True)]
    if denominator == "max":
        second = [reduce(torch.maximum, second)]
    elif reaching is not None:
        second = [reduce(torch.add, second) / reaching[0]]
    moved = parameter.to(dtype) * decay
    for moment, value, part in zip(first, second, factor.unbind(), strict=True):
        divisor = (value.sqrt() + eps) * part
        step = torch.where(divisor > 0, moment / divisor, 0) if no_eps else moment / divisor
        moved = moved - lr * step
    parameter.copy_(moved)


def _towards(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """``torch.lerp`` without its second formula for large weights, of which compiled code computes both."""
    return start + weight * (end - start)


def _options(shared: bool) -> dict[str, Any]:
    """What ``torch.compile`` is told: no checks before each call, where torch can leave them out; threads for any size.

    The checks would find nothing: each case has a kernel of its own, and what differs from call to call is free.
    """
    skip = getattr(torch.compiler, "skip_all_guards_unsafe", None)
    unguarded = {} if skip is None else {"guard_filter_fn": skip}
    return {**unguarded, "cpp.min_chunk_size": 0} if shared else unguarded


@cache
def _kernel(
    terms: int,
    squares: int,
    dtype: torch.dtype,
    wide: torch.dtype,
    device: torch.device,
    denominator: Denominator,
    amsgrad: bool,
    clips: bool,
    no_eps: bool,
    deferred: bool,
    packed: bool,
    threads: int,
    shared: bool,
) -> Callable[..., None]:
    """A kernel of its own for each case, compiled on zeros before any number of a training depends on it.

    Raises:
        RuntimeError: torch.compile does not work here.
    """
    function = with_own_code(_update_rows, f"update_{terms}_terms")
    options = {"dtype": wide, "denominator": denominator, "clips": clips, "no_eps": no_eps}
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=_options(shared))

    def kernel(*arguments: object) -> None:
        compiled(*arguments, **options)

    def zeros(rows: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(TRIAL, dtype=dtype, device=device) for _ in range(rows))

    own = terms if denominator == "own" else 1
    width = TRIAL if packed else 1
    coefficients = [
        torch.ones(count, width, dtype=wide, device=device) if count else None
        for count in (terms, squares, own, int(denominator == "mean"), squares * amsgrad)
    ]
    rows = [zeros(1), zeros(terms), zeros(own), zeros(squares), zeros(squares if amsgrad else 0)]
    for tensor in (tensor for group in rows for tensor in group):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for coefficient in coefficients:
        if packed and coefficient is not None:
            torch._dynamo.maybe_mark_dynamic(coefficient, 1)
    finite = torch.ones((), dtype=torch.bool, device=device) if deferred else None
    numbers = _numbers(Hyperparameters(1e-3, 0.9, 0.0 if no_eps else 1e-8, 1.0, denominator, 1.0), wide)
    try:
        kernel(rows[0][0], *rows[1:], *coefficients, *numbers, finite)
    except Exception as error:
        raise refusal(device, error) from error
    return kernel


def with_own_code(function: Callable[..., _T], name: str) -> Callable[..., _T]:
    """The same function with code of its own, by which torch keeps, and counts, what was compiled."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(co_name=name), function.__globals__)


def refusal(device: torch.device, error: Exception) -> RuntimeError:
    """What to raise where nothing can be compiled."""
    return RuntimeError(
        f"torch.compile cannot compile the update for {device}: {error}. Nothing was changed. On a CPU it needs a"
        " C++ compiler such as g++; or leave out compile=True."
    )
