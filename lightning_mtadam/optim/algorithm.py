"""Algorithm 1 of the paper, lines 8 to 14, on one chunk: ``b`` elements that lie side by side.

``backward`` leaves the balanced gradient in ``p.grad``: the sum over the terms, each times its scale. ``step`` takes it
from there: every term is absorbed, then the parameters move. With ``low_memory`` each term is absorbed as soon as its
gradient is there; with ``compile=True`` this same code becomes one kernel. Line 7 and the scales of line 8, which are
per layer, are in ``balancing.py``.

Two things are written otherwise than in the paper, and give the same numbers. All terms share the denominator of line
14 and the bias correction of line 11, so that the sum of their first moments is all that is used: one first moment
``M`` takes the sum. And ``v^`` of line 12 is averaged itself: with ``w = (1 - beta2) / (1 - beta2^t)``, lines 10 and 12
are ``v^ <- v^ + w (g~^2 - v^)``.

Shapes: parameter, gradient, total and each row of the moments [b]; a coefficient's row [b], or [1] where it is the same
for all of the chunk. ``V`` second moments are kept: one per term, or one with denominator "sum". ``scratch`` is memory
for results, [b] in the dtype of the arithmetic; ``None`` when compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.optim.chunks import Coefficients, Moments, Numbers

Rows: TypeAlias = Sequence[Tensor]


def balance(gradients: Rows, scales: Rows | Tensor, total: Tensor, scratch: Tensor | None = None) -> Tensor:
    """``sum_i g~_i`` with ``g~_i = scale_i g_i``   (line 8), written to the total."""
    torch.mul(gradients[0], scales[0], out=total)
    for gradient, scale in zip(gradients[1:], scales[1:], strict=True):
        total.add_(torch.mul(gradient, scale, out=scratch))  # not in one: then the last digit would tell the order
    return total


def update(
    parameter: Tensor,
    total: Tensor,
    gradients: Rows,
    moments: Moments,
    local: Coefficients,
    numbers: Numbers,
    scratch: Tensor | None,
) -> None:
    """Lines 9 to 14 of all terms, in place, from the balanced gradient and the terms' own; ``scratch``: rows."""
    wide, spare = moments.widened(local.weights.dtype), None if scratch is None else scratch[0]
    for term, gradient in enumerate(gradients):
        absorb(term, scaled(term, gradient, local, numbers, spare), wide, local, numbers)
    move(parameter, total, wide, local, numbers, spare)
    moments.keep(wide)


def scaled(term: int, gradient: Tensor, local: Coefficients, numbers: Numbers, scratch: Tensor | None) -> Tensor:
    """``g~_i = scale_i g_i``   (line 8). A gradient may be its own scratch."""
    assert local.scales is not None
    balanced = torch.mul(gradient, local.scales[term], out=scratch)
    return balanced if numbers.skipped is None else balanced.masked_fill_(numbers.skipped, 0)


def absorb(term: int, balanced: Tensor, moments: Moments, local: Coefficients, numbers: Numbers) -> None:
    """One term's part: the square of its balanced gradient, which is used up, enters its second moment."""
    if numbers.denominator == "own":  # m_i <- beta1 m_i + (1 - beta1) g~_i   (line 9)
        _average(moments.first[term], balanced, _unless_skipped(numbers.share, 0.0, balanced, numbers))
    # v^_i <- v^_i + w_i (g~_i^2 - v^_i)   (lines 10 and 12)
    _average(moments.second[term], balanced.mul_(balanced), local.weights[term])


def forget(term: int, moments: Moments, local: Coefficients) -> None:
    """A term without a gradient: its second moment sees a zero   (lines 10 and 12)."""
    moments.second[term].mul_(1 - local.weights[term])


def move(
    parameter: Tensor,
    total: Tensor,
    moments: Moments,
    local: Coefficients,
    numbers: Numbers,
    scratch: Tensor | None = None,
) -> None:
    """What is done once for all terms: the merged first moment, and the step."""
    first, second, largest = moments
    if numbers.denominator != "own":  # M <- beta1 M + (1 - beta1) / V sum_i g~_i   (line 9)
        mean = total.to(local.weights.dtype)
        if len(second) > 1 or numbers.skipped is not None:
            mean = torch.div(mean, len(second), out=scratch)
        if numbers.skipped is not None:
            mean.masked_fill_(numbers.skipped, 0)
        _average(first[0], mean, _unless_skipped(numbers.share, 0.0, mean, numbers))
        if numbers.denominator == "sum":  # v^ <- v^ + w ((sum_i g~_i)^2 - v^)   (lines 10 and 12, as in Adam)
            _average(second[0], torch.mul(mean, mean, out=scratch), local.weights[0])
    if largest and local.correction is not None:  # amsgrad: of what is not corrected yet
        for row, value, correction in zip(largest, second, local.correction, strict=True):
            found = value * correction
            row.copy_(torch.maximum(row, found if numbers.skipped is None else found.masked_fill_(numbers.skipped, 0)))
        second = [row / correction for row, correction in zip(largest, local.correction, strict=True)]
    moved = parameter.to(local.weights.dtype)
    if numbers.decay is not None:  # decoupled, as in AdamW
        moved.mul_(_unless_skipped(numbers.decay, 1.0, moved, numbers))
    # theta <- theta - lr M^ / (sqrt(max_i v^_i) + eps)   (lines 11 and 14; the factor is M's bias correction)
    squares = second if numbers.denominator == "own" else [_joined(second, local.reaching, scratch)]
    for moment, square, factor in zip(first, squares, local.factor, strict=True):
        _subtract_quotient(moved, moment, torch.sqrt(square, out=scratch).add_(numbers.eps).mul_(factor), numbers)
    if moved is not parameter:
        parameter.copy_(moved)


def _joined(second: Rows, reaching: Tensor | None, scratch: Tensor | None) -> Tensor:
    """``max_i v^_i``   (line 14); or their mean over the terms that reach."""
    joined, *others = second
    for row in others:
        joined = (torch.maximum if reaching is None else torch.add)(joined, row, out=scratch)
    return joined if reaching is None else torch.div(joined, reaching[0], out=scratch)


def _average(average: Tensor, value: Tensor, weight: float | Tensor) -> None:
    if torch.compiler.is_compiling():  # lerp has a second formula for large weights; a kernel would compute both
        average.add_(weight * (value - average))
    else:
        average.lerp_(value, weight)


def _subtract_quotient(parameter: Tensor, moment: Tensor, divisor: Tensor, numbers: Numbers) -> None:
    if isinstance(numbers.lr, float) and not numbers.no_eps:
        parameter.addcdiv_(moment, divisor, value=-numbers.lr)
        return
    quotient = torch.where(divisor > 0, moment / divisor, 0) if numbers.no_eps else moment / divisor
    if isinstance(numbers.lr, float):
        parameter.sub_(quotient, alpha=numbers.lr)
    else:
        parameter.sub_(numbers.lr * quotient)


def _unless_skipped(number: float | Tensor, otherwise: float, like: Tensor, numbers: Numbers) -> float | Tensor:
    """The number; the other in a step that may change nothing."""
    if numbers.skipped is None:
        return number
    return torch.where(numbers.skipped, otherwise, number if isinstance(number, Tensor) else like.new_full((), number))
