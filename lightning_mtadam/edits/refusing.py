"""The errors for edits of ``p.grad`` that cannot count."""

from __future__ import annotations

from collections.abc import Sequence


def refuse(names: Sequence[str], low_memory: bool) -> None:
    """Raise ``RuntimeError`` for edits of ``p.grad`` of these parameters, which cannot count."""
    why = (
        "with low_memory=True second moments have seen the terms' gradients already"
        if low_memory
        else "with denominator='own' each term is divided by itself, so that no step is taken on their sum"
    )
    raise RuntimeError(
        f"p.grad of {', '.join(map(repr, names))} was changed between backward() and step(), but {why}. No parameter"
        " was changed. Change the gradients of the terms instead: what p.register_hook(lambda gradient: ...) returns"
        " takes the place of the gradient of each term. Or use another denominator, and no low_memory."
    )


def refuse_unreached(names: Sequence[str]) -> None:
    """Raise ``RuntimeError`` for gradients where no term has one, so that there is nothing to divide them by."""
    raise RuntimeError(
        f"p.grad of {', '.join(map(repr, names))} holds a gradient, but no loss of this step reaches"
        f" {'it' if len(names) == 1 else 'them'}. Return what it comes from as one of the losses."
    )


def refuse_unbounded(names: Sequence[str]) -> None:
    """Raise ``RuntimeError`` for what was added to gradients of zeros: no second moment would bound the step."""
    raise RuntimeError(
        f"p.grad of {', '.join(map(repr, names))} was changed, but the gradient of every term is zero there, so that"
        " nothing bounds the step. Return what was added as one of the losses; for weight decay use weight_decay=."
    )
