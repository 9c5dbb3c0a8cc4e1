"""Lines 7 and 8 of Algorithm 1, as pure functions of tables: norms, their averages, the anchor, scales, clocks.

Shapes: ``I`` terms, ``L`` layers, ``P`` parameters. Everything is fp32 or better, whatever the parameters' dtype.
A term has reached a layer when its norm there is above zero, and not noise as :func:`loudness` says. ``layer_of``
[P] is the layer of each parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_mtadam.terms import Gradients

NormInit: TypeAlias = Literal["first", "unbiased", "one"]
Reference: TypeAlias = int | Literal["mean", "max"]
ROUNDING = 128.0  # epsilons: the share of a term's norm over the network below which a gradient may be rounding alone
CLEAR = 100.0  # times that: terms' shares at a layer of a deep network differ by less


def reference_of(anchor: str | None, terms: Sequence[str]) -> Reference:
    """Relative to what the balance weights are: the anchor; the first term where there is none."""
    if anchor == "mean" or anchor == "max":
        return anchor  # type: ignore[return-value]
    return 0 if anchor in ("first", "unit", None) else terms.index(anchor)


def wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of norms, scales and clocks: fp32, or wider if any tensor is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def norms_of(gradients: Gradients) -> list[Tensor | None]:
    """The L2 norm of each, a scalar in fp32, or wider if any gradient is; ``None`` where there is none."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return [None] * len(gradients)
    found = iter(torch._foreach_norm(present, 2.0, dtype=wide_dtype(present)))
    return [None if gradient is None else next(found) for gradient in gradients]


def norm_table(norms: Sequence[Gradients], like: Tensor, *, uniform: bool = False) -> Tensor:
    """The norms of all terms, zero where there is none: I lists of P -> [P, I], of the dtype and device of ``like``."""
    zero = like.new_zeros(())
    every = [zero if norm is None else norm for column in norms for norm in column]
    table = torch.stack(every if uniform else [norm.to(zero) for norm in every])
    return table.view(len(norms), -1).T.contiguous()


def layer_norms(parameter_norms: Tensor, layer_of: Tensor, layers: int) -> Tensor:
    """Join the norms of a layer's parameters: the L2 norm over all its entries. [P, I], >= 0 -> [L, I].

    Squares are taken relative to the layer's largest norm, so that none over- or underflows.
    """
    peak = by_layer(parameter_norms, layer_of, layers)
    divisor = torch.where(peak > 0, peak, 1)
    shares = (parameter_norms / divisor[layer_of]).square()
    return peak * add_up(shares, layer_of, layers).sqrt()


def add_up(shares: Tensor, layer_of: Tensor, layers: int) -> Tensor:
    """Add up the rows of each layer, numbers from 0 to 1: [P, I] -> [L, I].

    An accelerator adds in an order that changes from run to run. Whole numbers give the same sum in any order.
    """
    empty = shares.new_zeros(layers, shares.shape[1])
    if shares.device.type == "cpu":
        return empty.index_add_(0, layer_of, shares)
    unit = 2.0 ** (62 - len(shares).bit_length())  # the sum of P of them fits into 63 bits
    return empty.long().index_add_(0, layer_of, (shares * unit).long()).to(shares.dtype) / unit


def by_layer(rows: Tensor, layer_of: Tensor, layers: int) -> Tensor:
    """Take the largest row entry of each layer: [P, I] -> [L, I], for entries >= 0."""
    index = layer_of[:, None].expand_as(rows)
    return rows.new_zeros(layers, rows.shape[1]).scatter_reduce_(0, index, rows, "amax")


def update_norms(
    norms: Tensor,
    counts: Tensor,
    observed: Tensor,
    present: Tensor,
    beta3: Tensor,
    norm_init: NormInit,
    *,
    quadratic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Average the observed norms: ``n_i <- beta3 n_i + (1 - beta3) ||g_i||`` (Alg. 1, line 7). All are [L, I].

    The average ``norms`` of ``counts`` norms begins at the first step at which the term reaches the layer: with that
    norm itself ("first"), at zero ("unbiased", corrected when read) or at one ("one", the paper's). Where the term
    is not ``present`` nothing moves. With ``quadratic`` squares are averaged: a large norm then counts for more.
    ``beta3`` is a scalar or [L, 1]. Gives the new norms and counts.
    """
    reached = counts > 0
    moving = present & (reached | (observed > 0))
    start = {"first": observed, "unbiased": torch.zeros_like(norms), "one": torch.ones_like(norms)}[norm_init]
    previous = torch.where(reached, norms, start)
    if quadratic:
        averaged = torch.hypot(beta3.sqrt() * previous, (1 - beta3).sqrt() * observed)
    else:
        averaged = beta3 * previous + (1 - beta3) * observed
    if norm_init == "first":  # b * x + (1 - b) * x is not x to the last digit
        averaged = torch.where(reached, averaged, observed)
    return torch.where(moving, averaged, norms), counts + moving


def corrected_norms(
    norms: Tensor, counts: Tensor, beta3: Tensor, norm_init: NormInit, *, quadratic: bool = False
) -> Tensor:
    """The gradient norms n_i as the balance uses them: "unbiased" divides by ``1 - beta3^count``. [L, I]."""
    if norm_init != "unbiased":
        return norms
    correction = bias_correction(counts, beta3.log())
    return norms / (correction.sqrt() if quadratic else correction)


def without_start(norms: Tensor, counts: Tensor, beta3: Tensor) -> Tensor:
    """What averages that began at one have observed, at the most: what rounding may have lost is added. [L, I]."""
    start = torch.where(counts > 0, (counts * beta3.log()).exp(), 0)
    return ((norms - start * (1 - counts * torch.finfo(norms.dtype).eps)) / (1 - start)).clamp(min=0)


def loudness(norms: Tensor, silent: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where a term's gradient is noise, where it is faint, and where it is clear: [L, I] -> [L, I] each, bool.

    What counts is its share of the same term's norm over the network, so that no factor matters. A gradient that is
    zero but for rounding is faint; but so are real ones in a deep network's first layers. So a term is noise only
    where another is clear, which those that are ``silent`` [I] never are. Of a term that is zero everywhere, nothing.
    """
    relative = norms / norms.amax(0)  # no square over- or underflows
    shares = relative / torch.linalg.vector_norm(relative, dim=0)
    threshold = ROUNDING * torch.finfo(norms.dtype).eps
    faint, clear = shares < threshold, shares > CLEAR * threshold
    clear = clear if silent is None else clear.masked_fill(silent, False)
    return faint & clear.any(1, keepdim=True), faint, clear


def geometric_mean(norms: Tensor) -> Tensor:
    """The geometric mean over the terms that reach the layer; zero where none does. [L, I] -> [L, 1].

    Logarithms are relative to the largest: of one term, or of equal ones, the mean is exact.
    """
    reached = norms > 0
    count = reached.sum(1, keepdim=True)
    largest = norms.amax(1, keepdim=True)
    logs = torch.where(reached, norms.log() - largest.log(), 0).sum(1, keepdim=True)
    root = torch.exp(logs / (2 * count.clamp(min=1)))  # the share itself may be too small for the dtype
    return torch.where(count > 0, largest * root * root, 0)


def reference_norms(norms: Tensor, reference: Reference) -> Tensor:
    """The magnitude n_anchor that every term is brought to, per layer: [L, I] -> [L, 1].

    A layer that the anchor does not reach takes the geometric mean of the terms that do: symmetric, invariant to their
    scales, and plain Adam where a layer is private to one term. (The paper's formula would freeze it.)
    """
    if reference == "mean":
        return geometric_mean(norms)
    if reference == "max":
        return norms.amax(1, keepdim=True)
    anchor = norms[:, reference : reference + 1]
    return torch.where(anchor > 0, anchor, geometric_mean(norms))


def target_norms(norms: Tensor, anchor: str | None, terms: Sequence[str]) -> Tensor | None:
    """The magnitude that the terms are brought to, [L, 1]; ``None`` if they are left as they are."""
    if anchor is None:
        return None
    return norms.new_ones(len(norms), 1) if anchor == "unit" else reference_norms(norms, reference_of(anchor, terms))


def balance_scales(norms: Tensor, reference: Tensor | None, importance: Tensor, max_scale: float) -> Tensor:
    """What multiplies each term's gradient: ``importance_i n_anchor / n_i`` (Alg. 1, line 8). [L, I] -> [L, I].

    ``reference``, [L, 1] or [L, I], is the magnitude to bring them to, ``None`` leaves them as they are. ``importance``
    [I] are the wanted ratios; ``max_scale`` caps the ratio of norms. Finite; zero where the term has not reached.

    Example:
        >>> balance_scales(torch.tensor([[1.0, 4.0, 0.0]]), torch.tensor([[1.0]]), torch.ones(3), math.inf)
        tensor([[1.0000, 0.2500, 0.0000]])
    """
    if reference is None:
        return importance.expand_as(norms)
    largest = torch.finfo(norms.dtype).max
    ratios = torch.where(norms > 0, (reference / norms).clamp(max=min(max_scale, largest)), 0)
    return (ratios * importance).clamp(max=largest)


def balance_weights(norms: Tensor, reference: Tensor) -> Tensor:
    """The balance weights ``n_i / n_anchor``, nan where the term has not reached the layer. [L, I]."""
    return torch.where((norms > 0) & (reference > 0), norms / reference, math.nan)


def tick(clocks: Tensor, reaching: Tensor, touched: Tensor) -> Tensor:
    """Advance Adam's clocks by one step, [P, 1 + I]: the parameter's clock, then each term's.

    A parameter's clock counts the steps in which any term's graph reached it (``touched``, [P, 1] bool), as Adam's
    does. A term's own corrects the bias of its second moment: it runs from the first step on at which its gradient
    counts (``reaching``, [P, I] bool). Terms that are there first share the parameter's; a later one starts at one.
    """
    shared, own = clocks[:, :1] + 1, clocks[:, 1:]
    running = own > 0
    start = torch.where(running.any(1, keepdim=True), torch.ones_like(shared), shared)
    own = torch.where(running, own + 1, torch.where(reaching, start, own))
    return torch.where(touched, torch.cat([shared, own], 1), clocks)


def bias_correction(clocks: Tensor, log_beta: Tensor) -> Tensor:
    """``1 - beta^clock``, accurate also where it is small; one where the clock has not started."""
    return torch.where(clocks > 0, -torch.expm1(clocks * log_beta), 1)


def record_scales(averages: Tensor, counts: Tensor, scales: Tensor, finite: Tensor | None) -> None:
    """Average the logarithm of the scales, in place, over the ``counts`` steps in which they are above zero: [P, I].

    The average is geometric, as scales are ratios: a factor on a loss then divides it exactly. It is a running mean: a
    sum in fp32 would lose digits, and a mean of equal numbers stays exact. Where ``finite`` is false nothing moves.
    """
    counted = scales > 0
    if finite is not None:
        counted = counted & finite
    counts.add_(counted)
    averages.lerp_(torch.special.xlogy(counted, scales), counted / counts.clamp(min=1))


def average_scales(averages: Tensor, counts: Tensor, layer_of: Tensor, layers: int) -> Tensor:
    """The geometric mean of each layer's recorded scales, [L, I]; nan where none was above zero.

    All parameters of a layer have the same entries, but for those that were trained from a later step on.
    """
    empty = averages.new_zeros(layers, averages.shape[1])
    steps = empty.index_add(0, layer_of, counts)
    logs = empty.index_add(0, layer_of, averages * counts) / steps
    return torch.where(steps > 0, logs.exp(), math.nan)
