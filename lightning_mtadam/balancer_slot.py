"""What balances the losses of a module: its optimizer, or a balancer, which has its place here."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_mtadam.balancers import Balancer
from lightning_mtadam.lightning_internals import has_trainer
from lightning_mtadam.optim import MTAdam
from lightning_mtadam.terms import warn
from lightning_mtadam.wrappers import wrapped_in

CHECKPOINT_KEY = "lightning_mtadam_balancer"


class BalancerSlot(nn.Module):
    """A module that may have a balancer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._balancers: list[Balancer | None] = []  # what configure_balancer has returned, once it was asked

    def configure_balancer(self) -> Balancer | None:
        """Override it to balance the losses by something else than MTAdam, before any torch optimizer steps.

        Returns:
            A balancer, or ``None``: then the optimizer is MTAdam, or the module trains on the plain sum.

        Example:
            >>> from lightning_mtadam import MultiTermLightningModule
            >>> from lightning_mtadam.balancers import GradNorm
            >>> class Weighted(MultiTermLightningModule):
            ...     def configure_balancer(self):
            ...         return GradNorm(shared="encoder")
            ...     def configure_optimizers(self):
            ...         return torch.optim.Adam(self.parameters())
        """
        return None

    @property
    def balancer(self) -> Balancer | None:
        """What it was set to, or ``configure_balancer`` returned when it was first needed.

        What it learns is then part of this module. Set it in ``__init__`` where it is an argument: LightningCLI makes
        the optimizer of ``self.parameters()`` before anything else is asked for.

        Raises:
            TypeError: it is set to, or ``configure_balancer`` returned, something else than a balancer.
            RuntimeError: ``configure_balancer`` failed.
        """
        if not self._balancers:
            try:
                made = self.configure_balancer()
            except AttributeError as error:  # a module's properties would say that there is no "balancer"
                raise RuntimeError(f"configure_balancer failed: {error}") from error
            self.balancer = made
        return self._balancers[0]

    @balancer.setter
    def balancer(self, balancer: Balancer | None) -> None:
        if balancer is not None and not isinstance(balancer, Balancer):
            raise TypeError(
                "configure_balancer must return, or self.balancer be set to, a balancer of lightning_mtadam.balancers"
                f" or None, but got a {type(balancer).__name__}."
            )
        self._balancers[:] = [balancer]
        if balancer is not None and balancer.learned is not None:
            self.add_module("learned_balance", balancer.learned)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hook: Any = cls.on_load_checkpoint
        if not hasattr(hook, "then_loads_balancer"):  # the user's own, which need not call super
            cls.on_load_checkpoint = _then_load_balancer(hook)  # type: ignore[method-assign]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As of every LightningModule; then ``load_from_checkpoint`` brings the balancer's state, or warns."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module; with what the balancer learns."""
        _ = self.balancer
        return super().load_state_dict(*args, **kwargs)


def _then_load_balancer(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, after which a module that no trainer has yet takes the balancer's state."""

    @wraps(hook)
    def on_load_checkpoint(self: BalancerSlot, checkpoint: dict[str, Any]) -> None:
        hook(self, checkpoint)
        outermost: Any = type(self).on_load_checkpoint
        if outermost is on_load_checkpoint and not has_trainer(self):
            _load_or_warn(self.balancer, checkpoint.get(CHECKPOINT_KEY))

    on_load_checkpoint.then_loads_balancer = True  # type: ignore[attr-defined]
    return on_load_checkpoint


def _load_or_warn(balancer: Balancer | None, saved: dict[str, Any] | None) -> None:
    if balancer is None and saved is not None:
        warn(
            f"The checkpoint was made with the balancer {saved['balancer']}, but the module has none: its state was not"
            " loaded. To go on with it, return it from configure_balancer."
        )
    elif balancer is not None and saved is None:
        warn(f"The checkpoint was made without a balancer: {type(balancer).__name__} begins anew.")
    elif balancer is not None and saved is not None:
        try:
            balancer.load_state_dict(saved)
        except ValueError as error:
            warn(f"{type(balancer).__name__} begins anew: {error}")


BalancerSlot.on_load_checkpoint = _then_load_balancer(BalancerSlot.on_load_checkpoint)  # type: ignore[method-assign]


def balancer_of(module: nn.Module) -> Balancer | None:
    """The balancer of a module, if it can have one, and has."""
    balancer = getattr(module, "balancer", None)
    return balancer if isinstance(balancer, Balancer) else None


def mtadam_of(optimizer: Optimizer) -> MTAdam | None:
    """The optimizer, if it balances the losses by itself; or what it wraps, if that does and trains the same."""
    if isinstance(optimizer, MTAdam):
        return optimizer
    found = [mtadam for held in wrapped_in(optimizer) if (mtadam := mtadam_of(held)) is not None]
    alike = [mtadam for mtadam in found if _parameters_of(mtadam) == _parameters_of(optimizer)]
    return alike[0] if alike else None


def _parameters_of(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
