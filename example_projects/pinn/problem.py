"""The equation ``u'' = -(4 pi)^2 sin(4 pi x)`` on [0, 1] with ``u(0) = 0`` and ``u(1) = 1``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FREQUENCY = 4 * math.pi


def solution(x: Tensor) -> Tensor:
    """The exact solution ``u = sin(4 pi x) + x``. [N, 1] -> [N, 1]."""
    return torch.sin(FREQUENCY * x) + x


def source(x: Tensor) -> Tensor:
    """The right-hand side of the equation, ``u''``. [N, 1] -> [N, 1]."""
    return -(FREQUENCY**2) * torch.sin(FREQUENCY * x)


def grid(points: int) -> Tensor:
    """Points at equal distances from 0 to 1. [N, 1]."""
    return torch.linspace(0, 1, points)[:, None]


def pinn_losses(u: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The mean squares of what is left of the equation and of the boundary conditions.

    Args:
        u: [N, 1], a function of ``x``, point by point, with its graph.
        x: [N, 1], the points; the first is 0 and the last is 1.

    Example:
        >>> x = grid(9).requires_grad_()
        >>> {name: loss.item() < 1e-6 for name, loss in pinn_losses(solution(x), x).items()}
        {'residual': True, 'boundary': True}
    """
    ends = torch.stack([u[0], u[-1]])
    return {
        "residual": F.mse_loss(second_derivative(u, x), source(x)),
        "boundary": F.mse_loss(ends, torch.tensor([[0.0], [1.0]]).to(ends)),
    }


def second_derivative(u: Tensor, x: Tensor) -> Tensor:
    """``u''`` at every point, with its graph. [N, 1] -> [N, 1]."""
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return curvature


def relative_error(u: Tensor, x: Tensor) -> Tensor:
    """The L2 norm of the error over that of the solution. [N, 1] -> scalar."""
    exact = solution(x)
    return torch.linalg.vector_norm(u - exact) / torch.linalg.vector_norm(exact)
