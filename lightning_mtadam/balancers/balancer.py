"""What all balancers have in common: terms, checks, the state, and where a step begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.balancers.steps import Steps
from lightning_mtadam.collect import as_losses, collect
from lightning_mtadam.distributed.agreement import Numbers, Parameters
from lightning_mtadam.distributed.joint_terms import Ranks
from lightning_mtadam.distributed.processes import has_static_graph, processes_of
from lightning_mtadam.terms import Losses, are_on_host, check_losses, check_terms, steps_by_lbfgs


class Balancer(ABC):
    """Makes one gradient of several losses; any torch optimizer then steps on it.

    In a :class:`~lightning_mtadam.MultiTermLightningModule` it is what ``configure_balancer`` returns. Elsewhere
    ``balancer.backward(losses, optimizer, model=model)`` takes the place of ``sum.backward()``.

    Args:
        terms: the names of the losses, if known ahead; otherwise they are taken from the first losses.

    Raises:
        TypeError, ValueError: the terms are no sequence of names that differ.

    A balancer of your own is a subclass with a method :meth:`balance`; ``docs/balancers/your_own.md`` writes one.

    Attributes:
        state: what is remembered after the last batch, in checkpoints too. Its tensors are replaced, never changed.
        state_before: the same, before the step that this batch belongs to: where several batches accumulate, the state
            follows from this one and all of them. A step is what lies between two calls of ``optimizer.step``.
        learned: parameters that the module's optimizer is to learn; ``None`` if there are none.
        one_backward: whether there is one ordinary backward pass, which wrappers of the network see.
        works_on_shards: whether parameters may be sharded.
        looks_ahead: whether terms are differentiated by themselves before that one backward pass.
        has_objective: whether the gradient is that of one function of the parameters, the same one all through a step,
            whose value :meth:`balance` returns. Only then LBFGS, which compares values, may step on it.

    Example:
        >>> class Mean(Balancer):
        ...     def balance(self, batch):
        ...         batch.run_weighted([1 / len(batch.losses)] * len(batch.terms))
        >>> w = nn.Parameter(torch.tensor(2.0))
        >>> model, optimizer = nn.ParameterList([w]), torch.optim.SGD([w])
        >>> Mean().backward({"fit": (w - 1).square(), "decay": w.square()}, optimizer, model=model)
        >>> w.grad  # (2 + 4) / 2
        tensor(3.)
    """

    learned: nn.Module | None = None
    one_backward: ClassVar[bool] = True
    works_on_shards: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    has_objective: ClassVar[bool] = False

    def __init__(self, terms: Iterable[str] | None = None) -> None:
        self._terms = () if terms is None else check_terms(terms)
        self.state: dict[str, Tensor] = {}
        self.state_before: dict[str, Tensor] = {}
        self._steps = Steps()
        self._again = False  # whether the step was evaluated before, by the same call of optimizer.step
        self._value: Tensor | None = None  # of the objective, in the last batch
        self._left: list[tuple[int, int]] = []  # what the last backward pass left in .grad
        self._ranks = Ranks(late=not self.one_backward)

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the loss terms, in order; empty until they are known."""
        return self._terms

    def attach(self, model: nn.Module) -> None:  # noqa: B027 - most have nothing to prepare
        """Prepare the network ``model``, before its first forward pass; calling it again does nothing more."""

    def backward(
        self,
        losses: Losses,
        optimizer: Optimizer,
        *,
        model: nn.Module,
        grad_output: Tensor | None = None,
        loss_scale: Tensor | None = None,
        retain_graph: bool = False,
        run: Callable[..., None] = torch.autograd.backward,
    ) -> Tensor | None:
        """Leave the balanced gradient in ``p.grad``; several batches before the optimizer's step add up.

        Args:
            losses: named scalar losses. Terms may be absent, or a constant zero, which is the same; a name that is not
                in :attr:`terms` is an error.
            optimizer: steps on the gradient.
            model: the network as it is called, wrapped by ``DistributedDataParallel`` or not.
            grad_output: scalar by which every loss is multiplied, e.g. one over the number of accumulated batches.
            loss_scale: scalar, what a gradient scaler multiplied into ``grad_output``.
            retain_graph: whether to keep the graph for another backward pass, e.g. for another optimizer.
            run: runs an ordinary backward pass from a scalar, where it is not ``scalar.backward()``; it takes
                ``retain_graph=True`` where that is given.

        Returns:
            The value that the gradient belongs to, a scalar without a graph and without the loss scale: what a closure
            returns to the optimizer. ``None`` from balancers without an objective (:attr:`has_objective`).

        Raises:
            ValueError: no losses, a loss that is no scalar or has no graph, an unknown name; the processes have
                different terms, or train different parameters; the wrapper's options do not go with the balancer; LBFGS
                with a balancer that has no objective.
            TypeError: a loss that is no real floating-point tensor.
            NonFiniteError: a loss that is inf or nan, unless there is a ``loss_scale``. On an accelerator, which the
                host does not wait for, gradients become inf or nan instead, as without a balancer.

        An optimizer may evaluate its closure several times a step. The balancer advances once: by the first evaluation
        of a call of ``step``, where the step begins; of batches before that call, which were dropped, the last counts.

        Example:
            >>> from lightning_mtadam.balancers import FixedWeights
            >>> w = nn.Parameter(torch.tensor([3.0, 3.0]))
            >>> model, balancer = nn.ParameterList([w]), FixedWeights({"a": 1.0, "b": 100.0})
            >>> optimizer = torch.optim.LBFGS([w], line_search_fn="strong_wolfe")
            >>> def closure():
            ...     optimizer.zero_grad()
            ...     losses = {"a": (w[0] - 1) ** 2 + w[0] ** 4, "b": (w.sum() + 1) ** 4}
            ...     return balancer.backward(losses, optimizer, model=model)
            >>> for _ in range(5):
            ...     _ = optimizer.step(closure)
            >>> round(float(closure()), 2)  # a + 100 b; at the best w, b is 0
            0.29
        """
        parameters = parameters_in(optimizer)
        losses = as_losses(losses, optimizer, by="" if self.has_objective else type(self).__name__)
        begins = self._steps.ended or self._was_reset(parameters)
        if self._steps.follow(optimizer) and begins:
            self._steps.ended = True  # so has what there was with another one
        processes = processes_of(model, parameters)
        run = partial(run, retain_graph=True) if retain_graph else run
        factors = grad_output, loss_scale
        batch = Batch(losses, parameters, model, *factors, processes, retain_graph=retain_graph, begins=begins, run=run)
        pending = () if begins else self.pending_terms()
        check, take = partial(self._check_all, batch, optimizer), self._take
        self._terms = collect(batch, check, take, self._terms, pending, self._ranks).terms
        self._left = _versions(parameters)
        self._steps.note_batch()
        if self._value is not None and steps_by_lbfgs(optimizer):
            return batch.mean_over_processes(self._value)  # as the gradient is
        return self._value

    def name_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:  # noqa: B027 - only MTAdam keeps names
        """Does nothing with ``named``: names are taken from the network, in every call of :meth:`backward`."""

    def end_epoch(self) -> None:  # noqa: B027 - most know no epochs
        """An epoch of training has ended. A trainer calls it; without one it is yours to call."""

    def gradient_norms(self) -> dict[str, Tensor]:
        """The moving averages n_i of the gradient norms by layer, tensors [I]; empty where there are none."""
        return {}

    def scales(self) -> dict[str, Tensor]:
        """What multiplied the terms' gradients by layer in the last step, tensors [I]; empty if that is not known."""
        return {}

    def average_weights(self) -> dict[str, Tensor]:
        """The weights of each term, averaged over the steps, one per layer: [L]; empty where none are kept."""
        return {}

    def term_weights(self) -> dict[str, Tensor]:
        """What multiplies each loss, a scalar per term; empty if that is not known, or differs between layers."""
        return {}

    def balance_weights(self) -> dict[str, Tensor]:
        """The balance weights n_i / n_anchor by layer, tensors [I]; empty where there are none per layer."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What training needs to continue bit for bit, but for :attr:`learned`, which is the module's."""
        return {"balancer": type(self).__name__, "terms": self._terms, "state": dict(self.state)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load ``state_dict``, which :meth:`state_dict` gave.

        Raises:
            ValueError: it is another balancer's, has other terms, or is no balancer's; nothing was changed.
        """
        if not {"balancer", "terms", "state"} <= state_dict.keys():
            raise ValueError(
                f"This is no balancer's state: it has {[*state_dict][:4]}, where 'balancer', 'terms' and 'state' are"
                " needed. Load what balancer.state_dict() gave; in a checkpoint of Lightning's it is"
                " checkpoint['lightning_mtadam_balancer']."
            )
        for name, value in state_dict["state"].items():
            if not isinstance(value, Tensor):
                raise ValueError(f"The checkpoint's state of the balancer has {name!r}, which is no tensor. Remove it.")
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
        self.state = {key: value.clone() for key, value in state_dict["state"].items()}
        self._steps.ended = True

    @abstractmethod
    def balance(self, batch: Batch) -> Tensor | None:
        """Leave a gradient in ``p.grad``, and set ``state`` from ``state_before`` and all batches of the step so far.

        Args:
            batch: its losses are checked, and agreed on by all processes. ``batch.run_weighted(weights)`` is one
                backward pass of their weighted sum.

        Returns:
            With :attr:`has_objective` the value whose gradient it is, a scalar without a graph, but for the factor:
            ``batch.run_weighted(weights).sum()`` if the weights are the same all through the step.
        """

    def check(self, batch: Batch, optimizer: Optimizer) -> None:
        """Raise ``ValueError`` if ``optimizer`` cannot balance the losses of ``batch``; nothing was changed yet."""
        if batch.processes.sharded and not self.works_on_shards:
            raise ValueError(
                f"{type(self).__name__} needs whole gradients, but the parameters are sharded. Use strategy='ddp', or"
                " MTAdam, which balances sharded parameters."
            )

    def place(self, value: Tensor, device: torch.device) -> Tensor:
        """An entry of the state, ``value`` of any shape, maybe of a checkpoint, on the ``device`` of the parameters."""
        return value.to(device)

    def pending_terms(self) -> tuple[str, ...]:
        """The terms of earlier batches of the step, if their gradients are held."""
        return ()

    def _check_all(self, batch: Batch, optimizer: Optimizer) -> Parameters:
        alone = batch.processes.group is None
        finite = batch.loss_scale is None and are_on_host(batch.parameters)
        check_losses(batch.losses, self._terms or None, finite=finite, graph=alone or self.one_backward)
        if self.looks_ahead:
            _refuse_static_graph(batch.model)
        self.check(batch, optimizer)
        if alone:
            return ()
        if self._ranks.parameters is None:
            self._ranks.options = self._told_options()
        return _named_shapes(batch.network, batch.parameters)  # a walk over the network

    def _take(self, batch: Batch) -> None:
        if batch.begins:
            self._again = self._steps.evaluated and not self._steps.ended
        if self._steps.ended:  # else batches of the same step were dropped, or a scaler has skipped it
            device = batch.parameters[0].device
            self.state_before = {key: self.place(value, device) for key, value in self.state.items()}
        after = self.state
        value = self.balance(batch)
        self._value = value.detach() * batch.share if self.has_objective and value is not None else None
        if self._again:
            self.state = after

    def _was_reset(self, parameters: list[Tensor]) -> bool:
        """Whether gradients were dropped since the last backward pass, or set to zero."""
        if all(parameter.grad is None for parameter in parameters):
            return True
        if _versions(parameters) == self._left:
            return False
        return not any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": Steps(), "_ranks": Ranks(late=not self.one_backward)}

    def _told_options(self) -> Numbers:
        """What must be the same on all ranks, as they tell each other: the options that are numbers, names or such."""
        simple = (int, float, str, tuple, list, dict, type(None))
        told = {name: value for name, value in vars(self).items() if isinstance(value, simple) and name[0] != "_"}
        told = {name: value for name, value in told.items() if name not in ("state", "state_before")}
        return (("balancer", type(self).__name__), *((name, repr(value)) for name, value in told.items()))


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


def _refuse_static_graph(model: nn.Module | None) -> None:
    """Raise if the wrapper takes the first time that the losses are differentiated for its one backward pass."""
    if has_static_graph(model):
        raise ValueError(
            "DistributedDataParallel(static_graph=True) would average nothing in the first step, because the balancer"
            " differentiates terms by themselves before the backward pass. Leave static_graph out."
        )
