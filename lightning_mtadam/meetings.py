"""Terms of a layer of several parameters, compared where they meet: on the parameters that both of them reach.

Shapes: ``P`` parameters in ``L`` layers, ``I`` terms. A whole network as one layer has parts that only some terms
reach, as the decoder of an autoencoder has. A norm over all of it would compare what lies side by side nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtadam.balancing import Reference, add_up


def newest_share(norms: Tensor, observed: Tensor, before: Tensor, counts: Tensor, decays: tuple[Tensor, int]) -> Tensor:
    """Which part of the averages ``norms`` the norm that came last, ``observed``, is: [L, I], from 0 to 1.

    ``before`` and ``counts`` say how many norms they average, before and with it. ``decays`` are beta3 and the power
    of the norms that is averaged, 1 or 2.
    """
    beta3, power = decays
    part = ((1 - beta3) * (observed / norms) ** power).clamp(max=1)
    return torch.where(counts > before, torch.where(before > 0, part, 1), 0).masked_fill(observed == 0, 0)


def follow_shares(shares: Tensor, observed: Tensor, whole: Tensor, newest: Tensor) -> Tensor:
    """Average the share of each parameter in the square of its layer's norm: [P, I], of a layer they add up to one.

    ``observed`` are the norms of the parameters, ``whole`` those of their layers, ``newest`` how much they count.
    """
    found = torch.where(whole > 0, (observed / whole).square(), 0)
    return torch.lerp(shares, found, newest)


def parameter_norms(whole: Tensor, shares: Tensor) -> Tensor:
    """The norms of parameters, from those of their layers and their shares in the squares: [P, I] each."""
    return whole * shares.sqrt()


def norms_where_met(norms: Tensor, shares: Tensor, layer_of: Tensor) -> Tensor:
    """The norm of each term on the parameters that another reaches as well: [L, I, I], of term i beside term j.

    Args:
        norms: of the layers, [L, I].
        shares: of the parameters in their squares, [P, I]; zero where a term does not reach.
        layer_of: the layer of each parameter, [P].
    """
    pairs = (shares[:, :, None] * (shares > 0)[:, None, :]).flatten(1)
    return norms[:, :, None] * add_up(pairs, layer_of, len(norms)).sqrt().view(*norms.shape, -1)


def compare(met: Tensor) -> Tensor:
    """The logarithm of each term's norm over each other's: [L, I, I]; nan where nothing joins the two.

    Terms that meet are compared there. Others are by the terms between them: the mean over all those to which both
    ways are known, the shorter ways first. A factor on a loss is in every comparison with it, and in no other.

    Example:
        >>> met = torch.tensor([[[4.0, 4, 0], [2, 2, 3], [0, 6, 6]]])  # the first and the last do not meet
        >>> compare(met).exp()[0, 0].round(decimals=4)
        tensor([1., 2., 1.])
    """
    logs = met.log() - met.transpose(1, 2).log()
    compared = logs.masked_fill((met == 0) | (met.transpose(1, 2) == 0), torch.nan)
    links = 1
    while links < met.shape[1] - 1:
        known = compared.isfinite()
        both = known[:, :, :, None] & known[:, None]  # [L, i, between, j]
        ways = torch.where(both, compared[:, :, :, None] + compared[:, None], 0).sum(2)
        compared = torch.where(known, compared, ways / both.sum(2))
        links *= 2
    return compared


def ratios(met: Tensor, reference: Reference, silent: Tensor | None) -> Tensor:
    """The norm that every term is brought to, over its own: [L, I]; zero where it reaches nothing.

    That of the reference term; the geometric mean of all that are joined, which also stands in for a term that is not
    joined; or that of the largest. Of these the ``silent`` terms, [I] bool, are none.
    """
    compared = compare(met)
    pivots = compared.isfinite() if silent is None else compared.isfinite() & ~silent
    logs = torch.where(pivots, -compared, 0).sum(2) / pivots.sum(2)
    if reference == "max":
        logs = logs - torch.where(pivots, logs[:, None], torch.inf).amin(2)
    if isinstance(reference, str):
        return logs.exp().nan_to_num(0)
    joined = -compared[:, :, reference]
    found = torch.where(joined.isfinite(), joined, logs).exp()
    direct = met[:, reference] / met[:, :, reference]  # to the last digit
    return torch.where((direct > 0) & direct.isfinite(), direct, found).nan_to_num(0)
