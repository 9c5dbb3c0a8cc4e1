"""What users make of ``p.grad`` between ``backward`` and ``step`` counts for the moments, or is refused.

The first moment is taken from ``p.grad`` itself, so that every edit counts there. The second moments are those of the
terms' gradients. A mask or a factor is the same for all terms. What is neither, such as noise, or a gradient that was
added, counts there as a part of the term with the largest scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.edits.shown import Shown
from lightning_mtadam.terms import are_on_host

PIECE = 1 << 20  # elements that are looked at together


AddUp: TypeAlias = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]


def share(shown: Shown, index: int, gradients: Sequence[Tensor], scales: Tensor, add_up: AddUp) -> bool:
    """Change the terms' gradients of a parameter such that they add up to what is in ``p.grad``.

    Where all are zero they cannot, and nothing would bound the step: gives whether that is so. An accelerator, of which
    the host reads nothing, is left without the edit there.

    Args:
        shown: holds what is in ``p.grad``.
        index: of the parameter.
        gradients: of the n terms that reach it.
        scales: what multiplies them, [n].
        add_up: makes their sum from gradients, scales and memory for it, as it was made before.
    """
    view = shown.gradient(index)
    if not view.numel():
        return False
    pieces, most = list(_pieces([view, *gradients])), scales == scales.amax()
    parts = most / most.sum()  # of what is neither mask nor factor
    factor = scales.new_ones(()) if shown.factor is None else shown.factor.to(view.dtype).to(scales)

    def whole_of(rows: Sequence[Tensor]) -> Tensor:
        """What was shown, to the last digit."""
        whole = add_up([row.to(scales.dtype) for row in rows], scales, torch.empty_like(rows[0], dtype=scales.dtype))
        return (whole.to(view.dtype) * factor.to(view.dtype)).to(scales.dtype)

    looked = [_compare(edited.to(scales), whole_of(rows), _tolerance(view)) for edited, *rows in pieces]
    told = _are_told(torch.stack(looked), _tolerance(view))
    for edited, *rows in pieces:
        whole = whole_of(rows)
        ratio = torch.where(told & (whole != 0), edited / whole, 1)
        for row, scale, part in zip(rows, scales, parts, strict=True):
            row.mul_(ratio)
            row.add_(torch.where(~told & (scale > 0), part * (edited - whole) / (scale * factor), 0))
    if are_on_host([view]):
        return not bool(scales.any()) and bool(view.any())
    view.mul_(scales.amax() > 0)
    return False


def _tolerance(view: Tensor) -> float:
    return 8 * max(torch.finfo(view.dtype).eps, torch.finfo(torch.float32).eps)  # a gradient scaler's factors are fp32


def _compare(edited: Tensor, whole: Tensor, tolerance: float) -> Tensor:
    """What the ratios of an edited gradient to what it was are like.

    Gives whether there is one everywhere, whether all are from 0 to 1, and of those that are not 0 the largest size,
    the smallest, and how many: [5].
    """
    ratio = torch.where(whole != 0, edited / whole, 1)
    sound = ((whole != 0) | (edited == 0)).all()
    shrunk = ((ratio >= 0) & (ratio <= 1 + tolerance)).all()
    kept, size = (ratio != 0) & (whole != 0), ratio.abs()
    most, least = torch.where(kept, size, 0).amax(), torch.where(kept, size, torch.inf).amin()
    return torch.stack([one.to(whole) for one in (sound, shrunk, most, least, kept.sum())])


def _are_told(looked: Tensor, tolerance: float) -> Tensor:
    """Whether the ratios say what was done, a boolean scalar; of n pieces, [n, 5].

    They do where every entry was only made smaller, as by masks and by clipping, or all by one factor.
    """
    sound, shrunk, _, least, _ = looked.amin(0).unbind()
    most, many = looked[:, 2].amax(), looked[:, 4].sum()
    alike = (most - least <= tolerance * most) & (many > 1)
    return sound.bool() & (shrunk.bool() | alike)


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The same pieces of tensors of one shape, along their first dimension."""
    tensors = [tensor if tensor.dim() else tensor[None] for tensor in tensors]
    length = max(1, PIECE * len(tensors[0]) // tensors[0].numel())
    for begin in range(0, len(tensors[0]), length):
        yield [tensor[begin : begin + length] for tensor in tensors]
