"""The Frechet distance between two Gaussians, precise and quick also where the covariances are singular."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 8


class Gaussian(NamedTuple):
    """What is known of a distribution of vectors.

    Attributes:
        mean: [D], float64.
        covariance: [D, D].
        rank: no more eigenvalues of the covariance than this are other than zero.
    """

    mean: Tensor
    covariance: Tensor
    rank: int


def fit(total: Tensor, products: Tensor, count: int) -> Gaussian:
    """The Gaussian with mean and covariance of n > 1 vectors.

    Args:
        total: their sum, [D].
        products: the sum of their outer products, [D, D].
        count: n.
    """
    mean = total / count
    covariance = (products - count * mean.outer(mean)) / (count - 1)
    return Gaussian(mean, covariance, min(len(mean), count - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> Tensor:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``, nan if a mean is not finite.

    ``tr (S1 S2)^(1/2)`` is the nuclear norm of ``R1^T R2`` for any ``R R^T = S``. So computed, eigenvalues that are
    zero but for rounding are left out of each covariance before roots are taken; of the product S1 S2 each of them
    would add the root of its rounding to the sum.

    Returns:
        A scalar.

    Example:
        >>> one = torch.eye(2, dtype=torch.float64)
        >>> frechet_distance(Gaussian(torch.zeros(2), one, 2), Gaussian(torch.tensor([3.0, 0.0]), 4 * one, 2))
        tensor(11., dtype=torch.float64)
    """
    means = (first.mean - second.mean).square().sum()
    if not means.isfinite():
        return torch.full_like(means, torch.nan)
    singular_values: Tensor = torch.linalg.svdvals(_root(first).T @ _root(second))
    return means + first.covariance.trace() + second.covariance.trace() - 2 * singular_values.sum()


def _root(gaussian: Gaussian) -> Tensor:
    """R [D, r] with R R^T equal to the covariance."""
    covariance, rank = gaussian.covariance, gaussian.rank + OVERSAMPLING
    if 2 * rank > len(covariance):
        return _root_of_all(covariance)
    # A few vectors span its range. Within it, it is a small matrix: 0.2 s where all of [2048, 2048] takes 4 s.
    generator = torch.Generator(covariance.device).manual_seed(0)
    probe = torch.randn(len(covariance), rank, dtype=covariance.dtype, device=covariance.device, generator=generator)
    basis: Tensor = torch.linalg.qr(covariance @ probe).Q
    return basis @ _root_of_all(basis.T @ covariance @ basis)


def _root_of_all(covariance: Tensor) -> Tensor:
    eigenvalues: Tensor
    vectors: Tensor
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    kept = eigenvalues > eigenvalues[-1] * len(eigenvalues) * torch.finfo(covariance.dtype).eps
    return vectors[:, kept] * eigenvalues[kept].sqrt()
