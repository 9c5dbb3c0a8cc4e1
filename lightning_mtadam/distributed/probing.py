"""What ``torch.distributed.checkpoint`` does to an optimizer before it saves or loads it."""

from __future__ import annotations

from torch.optim import Optimizer


def is_probed(optimizer: Optimizer) -> bool:
    """Whether ``torch.distributed.checkpoint`` called ``step``, with zeros as gradients, so that there be a state.

    It has set the learning rates to zero until ``step`` returns; ``zero_grad`` is what it calls next.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.requires_grad]
    return (
        not any(optimizer.state.values())
        and all(float(group["lr"]) == 0 for group in optimizer.param_groups)
        and all(gradient is not None and not bool(gradient.any()) for gradient in gradients)
    )


def refuse_probing() -> None:
    """Raise for an optimizer that cannot have a state yet."""
    raise RuntimeError(
        "torch.distributed.checkpoint needs the optimizer's state, which there is not before the terms are known. Name"
        " them ahead: MTAdam(..., terms=(...)). Nothing was changed."
    )
