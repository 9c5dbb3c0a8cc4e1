"""What all balancers have in common: terms, checks, the state, and where a step begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_mtadam.distributed.agreement import Parameters, tell
from lightning_mtadam.distributed.joint_terms import agree_on_terms
from lightning_mtadam.distributed.processes import Processes, processes_of
from lightning_mtadam.optim.finite import is_host
from lightning_mtadam.optim.options import check_terms
from lightning_mtadam.terms import Losses, check_losses


@dataclass(frozen=True)
class Batch:
    """The losses of one batch, and all that is needed to differentiate them.

    Attributes:
        losses: of the terms that are present, in the order of the terms.
        parameters: of the optimizer.
        model: the network, without a wrapper.
        grad_output: scalar by which every loss is multiplied: the loss scale over the number of accumulated batches.
        loss_scale: of a gradient scaler; ``None`` if there is none.
        processes: which train together.
        begins: whether it is the first batch of a step; the others are accumulated to it.
        run: runs an ordinary backward pass from a scalar.
    """

    losses: Losses
    parameters: list[Tensor]
    model: nn.Module
    grad_output: Tensor
    loss_scale: Tensor | None
    processes: Processes
    begins: bool
    run: Callable[[Tensor], None]

    @property
    def share(self) -> Tensor:
        """The part of the step's losses that is this batch's: one over the number of accumulated batches."""
        return self.grad_output if self.loss_scale is None else self.grad_output / self.loss_scale


class Balancer(ABC):
    """Makes one gradient of several losses; any torch optimizer then steps on it.

    In a :class:`~lightning_mtadam.MultiTermLightningModule` it is what ``configure_balancer`` returns. Elsewhere
    ``balancer.backward(losses, optimizer, model=model)`` takes the place of ``sum.backward()``.

    Args:
        terms: the names of the losses, if known ahead; otherwise they are taken from the first losses.

    Attributes:
        learned: parameters that the module's optimizer is to learn; ``None`` if there are none.
        one_backward: whether there is one ordinary backward pass, which wrappers of the network see.
        works_on_shards: whether parameters may be sharded.
        looks_ahead: whether terms are differentiated by themselves before that one backward pass.
    """

    learned: nn.Module | None = None
    one_backward: ClassVar[bool] = True
    works_on_shards: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False

    def __init__(self, terms: Iterable[str] | None = None) -> None:
        self._terms = () if terms is None else check_terms(terms)
        self._state: dict[str, Tensor] = {}  # after the last batch; tensors in it are replaced, never changed
        self._before: dict[str, Tensor] = {}  # before the step that batch belongs to
        self._stepped = True
        self._left: list[tuple[int, int]] = []  # what the last backward pass left in .grad
        self._watched: Optimizer | None = None

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the loss terms, in order; empty until they are known."""
        return self._terms

    def attach(self, model: nn.Module) -> None:  # noqa: B027 - most have nothing to prepare
        """Prepare the network, before its first forward pass; calling it again does nothing more."""

    def backward(
        self,
        losses: Losses,
        optimizer: Optimizer,
        *,
        model: nn.Module,
        grad_output: Tensor | None = None,
        loss_scale: Tensor | None = None,
        run: Callable[[Tensor], None] = torch.autograd.backward,
    ) -> None:
        """Leave the balanced gradient in ``p.grad``; several batches before the optimizer's step add up.

        Args:
            losses: named scalar losses. Terms may be absent; a name that is not in :attr:`terms` is an error.
            optimizer: steps on the gradient.
            model: the network as it is called, wrapped by ``DistributedDataParallel`` or not.
            grad_output: scalar by which every loss is multiplied, e.g. one over the number of accumulated batches.
            loss_scale: what a gradient scaler multiplied into ``grad_output``.
            run: runs an ordinary backward pass from a scalar, where it is not ``scalar.backward()``.

        Raises:
            ValueError: no losses, a loss that is no scalar or has no graph, an unknown name; the processes have
                different terms, or train different parameters; the wrapper's options do not go with the balancer.
            TypeError: a loss that is no real floating-point tensor.
            NonFiniteError: a loss that is inf or nan, unless there is a ``loss_scale``. On an accelerator, which the
                host does not wait for, gradients become inf or nan instead, as without a balancer.
        """
        parameters = parameters_in(optimizer)
        processes = processes_of(model, parameters)
        network = model.module if isinstance(model, DistributedDataParallel) else model
        begins = self._stepped or self._was_reset(parameters)

        def check() -> Parameters:
            finite = loss_scale is None and all(is_host(parameter.device) for parameter in parameters)
            check_losses(losses, self._terms or None, finite=finite, graph=processes.group is None)
            if self.looks_ahead:
                _refuse_static_graph(model)
            self._check(losses, network, optimizer, processes)
            return () if processes.group is None else _named_shapes(network, parameters)  # a walk over the network

        pending = () if begins else self._pending_terms()
        found, absent = agree_on_terms(
            losses, check, pending=pending, known=self._terms, processes=processes, model=model
        )
        terms = self._terms or found
        if begins and (self._stepped or loss_scale is None):  # else a scaler has skipped the step before
            self._before = {key: value.to(parameters[0].device) for key, value in self._state.items()}
        present = {name: losses[name] for name in terms if name in losses and name not in absent}
        factor = torch.ones_like(next(iter(losses.values()))) if grad_output is None else grad_output
        batch = Batch(present, parameters, network, factor.detach(), loss_scale, processes, begins, run)
        try:
            self._balance(batch, terms)
        except Exception as error:
            if processes.group is not None:
                tell(error, processes.group)
            raise
        self._terms, self._stepped, self._left = terms, False, _versions(parameters)
        self._watch(optimizer)

    def term_weights(self) -> dict[str, Tensor]:
        """What multiplies each loss, a scalar per term; empty if that is not known, or differs between layers."""
        return {}

    def balance_weights(self) -> dict[str, Tensor]:
        """The balance weights n_i / n_anchor by layer, tensors [I]; empty where there are none per layer."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What training needs to continue bit for bit, but for :attr:`learned`, which is the module's."""
        return {"balancer": type(self).__name__, "terms": self._terms, "state": dict(self._state)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            ValueError: it is another balancer's, or has other terms; nothing was changed.
        """
        saved, terms = state_dict["balancer"], tuple(state_dict["terms"])
        if saved != type(self).__name__:
            raise ValueError(
                f"The checkpoint holds the state of the balancer {saved}, but configure_balancer returns"
                f" {type(self).__name__}. Return the balancer it was made with, or load only the weights."
            )
        if self._terms and terms and terms != self._terms:
            raise ValueError(
                f"The checkpoint's balancer has the terms {terms}, but this one has {self._terms}. Give the terms it"
                " was made with, or load only the weights."
            )
        self._terms = terms or self._terms
        self._state = {key: value.clone() for key, value in state_dict["state"].items()}
        self._stepped = True

    @abstractmethod
    def _balance(self, batch: Batch, terms: tuple[str, ...]) -> None:
        """Run the backward passes, and set ``_state`` from ``_before`` and all batches of the step so far."""

    def _check(self, losses: Losses, model: nn.Module, optimizer: Optimizer, processes: Processes) -> None:
        """Raise if the losses cannot be balanced; nothing was changed yet."""
        if processes.sharded and not self.works_on_shards:
            raise ValueError(
                f"{type(self).__name__} needs whole gradients, but the parameters are sharded. Use strategy='ddp', or"
                " MTAdam, which balances sharded parameters."
            )

    def _pending_terms(self) -> tuple[str, ...]:
        """The terms of earlier batches of the step, if their gradients are held."""
        return ()

    def _was_reset(self, parameters: list[Tensor]) -> bool:
        """Whether gradients were dropped since the last backward pass, or set to zero."""
        if all(parameter.grad is None for parameter in parameters):
            return True
        if _versions(parameters) == self._left:
            return False
        return not any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)

    def _watch(self, optimizer: Optimizer) -> None:
        """Notice when the optimizer has stepped."""
        if self._watched is not optimizer:
            self._watched = optimizer
            optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer is self._watched:
            self._stepped = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watched": None, "_stepped": True}


def parameters_in(optimizer: Optimizer) -> list[Tensor]:
    """What the optimizer steps on, of all its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _versions(parameters: list[Tensor]) -> list[tuple[int, int]]:
    """Which tensors hold the gradients, and how often each was changed in place."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [(id(gradient), gradient._version) for gradient in gradients]


def _named_shapes(model: nn.Module, parameters: list[Tensor]) -> Parameters:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return tuple((names.get(id(parameter), "?"), tuple(parameter.shape)) for parameter in trained)


def _refuse_static_graph(model: nn.Module) -> None:
    """Raise if the wrapper takes the first time that the losses are differentiated for its one backward pass."""
    if any(isinstance(module, DistributedDataParallel) and module.static_graph for module in model.modules()):
        raise ValueError(
            "DistributedDataParallel(static_graph=True) would average nothing in the first step, because the balancer"
            " differentiates terms by themselves before the backward pass. Leave static_graph out."
        )
