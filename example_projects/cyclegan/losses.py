"""The six terms of the generators and the loss of a discriminator."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from example_projects.common.patchgan import square_loss

DOMAINS = ("A", "B")
ByDomain = Mapping[str, Tensor]  # a batch each


def lambdas(gan: float = 1.0, cycle: float = 10.0, identity: float = 0.5) -> dict[str, float]:
    """What each term is multiplied by, the anchor first.

    The cycle of A is the anchor: it passes through both generators, so it reaches every layer.

    Args:
        gan: lambda_1.
        cycle: lambda_2.
        identity: lambda_3, relative to the cycle's as in the original's code.

    Example:
        >>> lambdas()
        {'cycle_A': 10.0, 'cycle_B': 10.0, 'gan_A': 1.0, 'gan_B': 1.0, 'identity_A': 5.0, 'identity_B': 5.0}
    """
    factors = {"cycle": cycle, "gan": gan, "identity": cycle * identity}
    return {f"{kind}_{domain}": factor for kind, factor in factors.items() for domain in DOMAINS}


SETTINGS = {"balanced": lambdas(), "unbalanced": lambdas(cycle=1000.0)}
# The identities' weight is 0.5 of the cycles' in the original's code, and 0.5 in the MTAdam paper's text. Unbalanced,
# the text raises the cycles' alone: if the identities had the code's weight before, they keep its 5.
OTHER_READINGS = {
    "balanced-text": lambdas(identity=0.05),
    "unbalanced-text": lambdas(cycle=1000.0, identity=0.0005),
    "unbalanced-cycle": lambdas(cycle=1000.0, identity=0.005),
}


def generator_losses(real: ByDomain, cycled: ByDomain, kept: ByDomain, scores: ByDomain) -> dict[str, Tensor]:
    """The six terms, each under the letter of the domain that its images are to belong to.

    Args:
        real: the images, [B, 3, H, W].
        cycled: the same, through the other domain and back.
        kept: the same, through the generator that makes their own domain; it should change nothing.
        scores: what the domain's discriminator says of images made from the other domain.
    """
    losses = {}
    for domain in DOMAINS:
        losses[f"cycle_{domain}"] = F.l1_loss(cycled[domain], real[domain])
        losses[f"gan_{domain}"] = square_loss(scores[domain], real=True)
        losses[f"identity_{domain}"] = F.l1_loss(kept[domain], real[domain])
    return losses


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """The mean of both errors: so it learns at half the generator's pace.

    Args:
        real: the scores of real images.
        made: the scores of generated images.
    """
    return (square_loss(real, real=True) + square_loss(made, real=False)) / 2
