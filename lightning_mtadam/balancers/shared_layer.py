"""The gradients of the terms at a layer that they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.balancers.names import near_matches


def parameters_of(model: nn.Module, name: str) -> list[Tensor]:
    """The trained parameters of a module, or the one parameter, of this name.

    Raises:
        ValueError: there is none of this name, with near matches; or it holds no trained parameter.

    Example:
        >>> [tuple(parameter.shape) for parameter in parameters_of(nn.Sequential(nn.Linear(2, 3)), "0")]
        [(3, 2), (3,)]
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    if name in parameters:
        found = [parameters[name]]
    elif name and name in modules:
        found = list(modules[name].parameters())
    else:
        raise ValueError(
            f"shared={name!r} names no module or parameter of {type(model).__name__}. Near matches:"
            f" {near_matches(name, [*modules, *parameters])}. model.named_modules() and model.named_parameters() list"
            " the names."
        )
    trained: list[Tensor] = [parameter for parameter in found if parameter.requires_grad]
    if not trained:
        raise ValueError(f"shared={name!r} holds no parameter that requires a gradient. Name a layer that is trained.")
    return trained


def unreached_message(name: str) -> str:
    """Say that the term does not reach the shared layer, and what to do."""
    return (
        f"losses[{name!r}] does not reach the shared layer, so it cannot be compared there. Name a layer that all terms"
        " pass through, or leave the term out of the losses."
    )


def gradient_at(shared: Sequence[Tensor], loss: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor | None:
    """The gradient of a term at the shared layer, without the loss scale; the graph is kept.

    Nothing is written to ``.grad``, and no layer below is differentiated. Without a loss scale the backward pass begins
    with one: fused losses, which know their gradient ahead and multiply it in place, then leave it as it is.

    Returns:
        [|W|], times the batch's share of the step; ``None`` if the term does not reach the layer on this process.
    """
    if not loss.requires_grad:  # a constant on this process
        return None
    # By one, if no small gradient can vanish: a fused loss holds its gradient, and multiplies it in place in each pass.
    scale = None if batch.loss_scale is None else batch.factor.to(loss, copy=True)
    found = torch.autograd.grad(loss, shared, scale, retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in found):
        return None
    pieces = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(found, shared, strict=True)
    ]
    flat = torch.cat([piece.flatten() for piece in pieces]).to(dtype)
    return flat * batch.share.to(flat) if batch.loss_scale is None else flat / batch.loss_scale.to(flat)


def check_repeatable(name: str, first: Tensor | None, second: Tensor | None, by: str) -> None:
    """Raise ``ValueError`` if a term's gradient at the shared layer, [|W|], is another one the second time.

    ``by`` is the name of the balancer, for the message.

    Backward passes that write over what the forward pass has kept, as some fused losses do, may be run only once; a
    second one, which is what the network is trained by, would be wrong. Rounding passes.
    """
    if first is not None and second is not None and bool((second - first).norm() > 0.01 * first.norm()):
        raise ValueError(
            f"losses[{name!r}] has another gradient each time it is differentiated, but {by} does so twice: at the"
            " shared layer, and for the step. A fused loss may write over what its backward pass needs (such as"
            " inplace_backward=True): use one that does not, and multiply no constant into it. For dropout in a"
            " checkpointed segment keep preserve_rng_state=True."
        )
