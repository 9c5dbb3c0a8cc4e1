"""M-ConFIG: a momentum for each loss, of which one is differentiated in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

BETA1 = 0.9  # of the momenta, and of the Adam that steps


class MomentumConFIG:
    """Leaves gradients of which Adam makes the steps of M-ConFIG.

    With ``m_i`` the momentum of term i, corrected for its start, and ``g = ConFIG(m_1, ..., m_I)``, a step is
    ``lr g / (sqrt(v) + eps)``. In ``v`` are the squares of the gradients that would have made ``g`` Adam's momentum:

        p_t = (g_t (1 - beta1^t) - beta1 g_{t-1} (1 - beta1^{t-1})) / (1 - beta1)

    So Adam, given ``p_t`` as its gradient, has ``g_t`` for its first moment, and that ``v`` for its second.

    A step differentiates the term that was differentiated least often, of those that are there. There is no gradient,
    and no step, until every term was.

    Args:
        network: to be trained.
        terms: the names of the losses.

    References:
        Liu, Chu, Thuerey: ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, ICLR 2025,
        Algorithm 2. There only the loss that is differentiated is computed.
    """

    def __init__(self, network: nn.Module, terms: Sequence[str]) -> None:
        from torchjd.aggregation import ConFIG  # an extra: the other methods do without

        self.parameters = list(network.parameters())
        self.combine = ConFIG()
        self.counts = dict.fromkeys(terms, 0)
        zero = torch.zeros_like(nn.utils.parameters_to_vector(self.parameters))
        self.averages = {name: zero.clone() for name in terms}  # by term, [N]
        self.momentum = zero  # g_t (1 - beta1^t), [N]
        self.steps = 0

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Differentiate one of the losses, and leave gradients."""
        name = min(losses, key=self.counts.__getitem__)
        found = torch.autograd.grad(losses[name], self.parameters, materialize_grads=True)
        self.averages[name].lerp_(torch.cat([gradient.flatten() for gradient in found]), 1 - BETA1)
        self.counts[name] += 1
        if not all(self.counts.values()):
            return
        parts = self._next_gradient().split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _next_gradient(self) -> Tensor:
        self.steps += 1
        corrected = [average / (1 - BETA1 ** self.counts[name]) for name, average in self.averages.items()]
        momentum = self.combine(torch.stack(corrected)) * (1 - BETA1**self.steps)
        gradient = (momentum - BETA1 * self.momentum) / (1 - BETA1)
        self.momentum = momentum
        return gradient
