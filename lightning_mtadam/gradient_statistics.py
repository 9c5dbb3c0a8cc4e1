"""What the gradients of several losses are like beside each other, and in the update: pure functions of inner products.

Shapes: ``I`` terms, ``P`` parameters, ``L`` layers. All that is kept are inner products, in float64 on the host. They
add up: over the parameters of a layer, over the layers of a network, over the shards of a parameter.

The *update* is the gradient that the optimizer steps on, ``u = sum_i w_i g_i``. The weights ``w_i`` are one for the
plain sum of the losses. With MTAdam they are the scales, which differ from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from lightning_mtadam.terms import Gradients

DROWNED = 0.01
"""Below this share of the update, in magnitude, a term is drowned."""

CONFLICT = -0.05
"""Below this cosine two terms are in conflict. It is a little below zero: chance brings unrelated gradients there."""

PIECE = 1 << 20
"""How many elements are widened to float64 at a time."""

UNEXPLAINED = 1e-5
"""Weights explain an update if the square of what they leave of it is this share of its own square, or less."""

DEPENDENT = 1e-9
"""Gradients depend on each other where an eigenvalue of their cosines, relative to the largest, is below this."""


@dataclass(frozen=True)
class GradientStatistics:
    """The gradients g_i of I terms and the update u, at each of some places: ``...`` is (L,), or () of a network.

    Attributes:
        gram: [..., I + 1, I + 1], the inner products of g_1, ..., g_I and u.
        parts: [..., I], the inner products of each term's part of the update with it, ``<w_i g_i, u>``.

    Example:
        >>> a, b = [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 3.0])]
        >>> found = statistics_of([a, b]).whole
        >>> found.norms.tolist(), found.shares.tolist(), found.alignment.tolist()
        ([1.0, 3.0], [0.1, 0.9], 0.0)
    """

    gram: Tensor
    parts: Tensor

    @property
    def whole(self) -> GradientStatistics:
        """Those of the network, from those of its L layers."""
        return GradientStatistics(self.gram.sum(0), self.parts.sum(0))

    def by_layer(self, layer_of: Tensor, layers: int) -> GradientStatistics:
        """Those of L layers, from those of their P parameters, of which ``layer_of`` [P] says the layer."""
        return GradientStatistics(add_up(self.gram, layer_of, layers), add_up(self.parts, layer_of, layers))

    @property
    def finite(self) -> bool:
        """Whether no gradient has an entry that is inf or nan."""
        return bool(self.gram.isfinite().all())

    @property
    def norms(self) -> Tensor:
        """The L2 norm of each term's gradient: [..., I], >= 0."""
        return _norms(self.gram)[..., :-1]

    @property
    def update_norm(self) -> Tensor:
        """The L2 norm of the update: [...], >= 0."""
        return _norms(self.gram)[..., -1]

    @property
    def shares(self) -> Tensor:
        """The share of each term in the update: ``<w_i g_i, u> / ||u||^2``, [..., I]; nan where the update is zero.

        It is the length of the term's part along the update, over the update's. As the parts add up to the update,
        the shares add up to one. A share is negative where the term's part points against the update.
        In the regression of u on the gradients this is Pratt's measure, the coefficient times the correlation.

        References:
            J. W. Pratt, Dividing the indivisible: using simple symmetry to partition variance explained, 1987.
        """
        total = self.parts.sum(-1, keepdim=True)
        return torch.where(total > 0, self.parts / total, nan)

    @property
    def cosines(self) -> Tensor:
        """The cosine between each two terms' gradients: [..., I, I], -1 to 1; nan where one of them is zero."""
        return cosines_of(self.gram)[..., :-1, :-1]

    @property
    def cosines_to_update(self) -> Tensor:
        """The cosine between each term's gradient and the update: [..., I]; nan where one of them is zero."""
        return cosines_of(self.gram)[..., -1, :-1]

    @property
    def alignment(self) -> Tensor:
        """``2 ||mean_i g_i / ||g_i|| ||^2 - 1`` over the terms whose gradient is not zero: [...]; nan where all are.

        One where all point the same way, minus one where they cancel, ``2 / I - 1`` where they are orthogonal; of two
        terms it is their cosine.

        References:
            S. Wang, A. K. Bhartari, B. Li and P. Perdikaris, Gradient Alignment in Physics-informed Neural Networks: A
            Second-Order Optimization Perspective, 2025, arXiv 2502.00604.
        """
        cosines = self.cosines
        count = (self.norms > 0).sum(-1)
        square = cosines.nan_to_num(0).sum((-2, -1)) / count.square()  # nan without any
        return 2 * square - 1


def statistics_of(gradients: Sequence[Gradients], weights: Tensor | None = None) -> GradientStatistics:
    """The statistics at each of P parameters.

    Args:
        gradients: of each of I terms one for each of P parameters; ``None`` where the term does not reach it.
        weights: [P, I], what multiplies each term's gradient in the update; ``None``: one.

    Returns:
        Statistics with ``...`` = (P,): :meth:`~GradientStatistics.by_layer` or ``.whole`` adds them up.
    """
    gram = gram_matrices(gradients)
    return with_update(gram, gram.new_ones(gram.shape[:-1]) if weights is None else weights)


def gram_matrices(gradients: Sequence[Gradients]) -> Tensor:
    """The inner products of each two rows, at each of P parameters: [P, I, I], float64, on the host.

    Args:
        gradients: I rows of P; ``None`` counts as zero. Of sharded parameters this process's parts: add the matrices of
            all processes up.

    Example:
        >>> gram_matrices([[torch.ones(2), torch.tensor(2.0)], [torch.tensor([3.0, -1.0]), None]]).tolist()
        [[[2.0, 2.0], [2.0, 10.0]], [[4.0, 0.0], [0.0, 0.0]]]
    """
    matrices = [_gram(column) for column in zip(*gradients, strict=True)]
    return torch.stack([matrix.to("cpu", torch.float64) for matrix in matrices])


def with_update(gram: Tensor, weights: Tensor) -> GradientStatistics:
    """The statistics from the inner products of the terms alone, [P, I, I], and their weights, [P, I].

    ``<g_i, u> = sum_j w_j <g_i, g_j>``, and ``||u||^2 = sum_i w_i <g_i, u>``.

    Example:
        >>> opposed = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])
        >>> with_update(opposed, torch.tensor([[3.0, 1.0]])).whole.shares.tolist()
        [1.5, -0.5]
    """
    weights = weights.to(gram)
    mixed = (gram @ weights[..., None]).squeeze(-1)  # <g_i, u>
    parts = weights * mixed
    right = torch.cat([mixed, parts.sum(-1, keepdim=True)], -1)
    return GradientStatistics(torch.cat([torch.cat([gram, mixed[..., None]], -1), right[..., None, :]], -2), parts)


def with_measured_update(gram: Tensor) -> GradientStatistics:
    """The statistics from the inner products of the terms and a given update: [P, I + 1, I + 1].

    The weights are those of :func:`weights_of_update`. What these do not explain of the update has no part in the
    shares.

    Example:
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> found = with_measured_update(gram_matrices([[a], [b], [a + 3 * b]])).whole
        >>> found.shares.round(decimals=6).tolist()
        [0.1, 0.9]
    """
    return GradientStatistics(gram, weights_of_update(gram) * gram[..., :-1, -1])


def weights_of_update(gram: Tensor) -> Tensor:
    """The weights of the terms in an update whose inner products with them are known: [P, I + 1, I + 1] -> [P, I].

    They are one, if the update is the plain sum. Else they are the least squares solution of ``u = sum_i w_i g_i``: one
    weight per term, as methods have that weigh losses; or, if these do not explain the update, weights of its own for
    each parameter. Where gradients depend on each other, the smallest solution is taken: equal gradients have equal
    parts.

    Example:
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> weights_of_update(gram_matrices([[a], [b], [2 * a + 3 * b]])).round(decimals=6).tolist()
        [[2.0, 3.0]]
    """
    total = gram.sum(0)
    for weights in (total.new_ones(len(total) - 1), _least_squares(total)):
        rest = torch.cat([weights, weights.new_tensor([-1.0])])  # what is left of the update: sum_i w_i g_i - u
        if rest @ total @ rest <= UNEXPLAINED * total[-1, -1]:
            return weights.expand(len(gram), -1)
    return _least_squares(gram)


def cosines_of(gram: Tensor) -> Tensor:
    """The cosines of vectors from their inner products, [..., n, n]; nan where one of two is zero."""
    norms = _norms(gram)
    cosines = (gram / norms[..., None] / norms[..., None, :]).clamp(-1, 1)
    return torch.where((norms > 0)[..., None] & (norms > 0)[..., None, :], cosines, nan)


def add_up(rows: Tensor, layer_of: Tensor, layers: int) -> Tensor:
    """Add up the rows of each layer: [P, ...] -> [L, ...]."""
    return rows.new_zeros(layers, *rows.shape[1:]).index_add_(0, layer_of.to(rows.device), rows)


def dead(found: GradientStatistics, terms: Sequence[str]) -> tuple[str, ...]:
    """The terms of a network that have no gradient: zero, everywhere."""
    return tuple(term for term, norm in zip(terms, found.norms.tolist(), strict=True) if norm == 0)


def drowned(found: GradientStatistics, terms: Sequence[str]) -> tuple[str, ...]:
    """The terms of a network that have a gradient, but a share in the update below ``DROWNED`` in magnitude."""
    alive = set(terms) - set(dead(found, terms))
    shares = zip(terms, found.shares.tolist(), strict=True)
    return tuple(term for term, share in shares if term in alive and abs(share) < DROWNED)


def conflicts(found: GradientStatistics, terms: Sequence[str]) -> tuple[tuple[str, str, float], ...]:
    """Each two terms of a network whose cosine is below ``CONFLICT``, with it; the worst first.

    Example:
        >>> ahead, back = torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 0.0])
        >>> for one, other, cosine in conflicts(statistics_of([[ahead], [back], [back]]).whole, ("a", "b", "c")):
        ...     print(one, other, round(cosine, 3))
        a b -0.707
        a c -0.707
    """
    cosines = found.cosines.tolist()
    pairs = [(one, other) for one in range(len(terms)) for other in range(one + 1, len(terms))]
    against = [(terms[a], terms[b], cosines[a][b]) for a, b in pairs if cosines[a][b] < CONFLICT]
    return tuple(sorted(against, key=lambda pair: pair[2]))


def _gram(rows: Gradients) -> Tensor:
    """The inner products of the I gradients of one parameter: [I, I], on their device."""
    here = [index for index, row in enumerate(rows) if row is not None]
    flat = [row.detach().reshape(-1) for row in rows if row is not None]
    device = flat[0].device if flat else torch.device("cpu")
    wide = torch.float32 if device.type == "mps" else torch.float64  # which that device does not have
    gram = torch.zeros(len(rows), len(rows), dtype=wide, device=device)
    for start in range(0, len(flat[0]) if flat else 0, PIECE):
        piece = torch.stack([row[start : start + PIECE].to(wide) for row in flat])
        found = piece.new_zeros(len(rows), piece.shape[1])
        found[here] = piece
        gram += found @ found.T
    return gram


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def _least_squares(gram: Tensor) -> Tensor:
    """[..., I + 1, I + 1] -> [..., I]; of unit gradients, so that their magnitudes do not matter."""
    norms, cosines = _norms(gram), cosines_of(gram).nan_to_num(0)
    inverse = torch.linalg.pinv(cosines[..., :-1, :-1], rtol=DEPENDENT, hermitian=True)
    units = (inverse @ cosines[..., :-1, -1:]).squeeze(-1)
    return torch.where(norms[..., :-1] > 0, units * norms[..., -1:] / norms[..., :-1], 0)
