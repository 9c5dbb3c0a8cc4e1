"""An optimizer that is given the gradient of every term: what happens up to ``step``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_mtadam.collect import Batch, collect
from lightning_mtadam.collect.differentiate import refuse_reentrant_checkpoints
from lightning_mtadam.collect.norms import are_on_host
from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.collect.pending import ClipAlgorithm, PendingGradients
from lightning_mtadam.distributed.uninterrupted import uninterrupted
from lightning_mtadam.distributed import sharding
from lightning_mtadam.distributed.agreement import Parameters
from lightning_mtadam.distributed.processes import processes_of
from lightning_mtadam.optim.layers import LayerNames
from lightning_mtadam.optim.options import Options
from lightning_mtadam.terms import Losses, check_losses, check_terms


class TermOptimizer(Optimizer):
    """Collects the gradients of named losses; a subclass consumes them in its ``step``.

    ``terms`` are the names of the losses that are known ahead; ``None`` takes them from the first losses.
    """

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], options: Options, terms: Iterable[str] | None
    ) -> None:
        # Lightning wraps optimizers in an object that has this class but not these attributes: methods may change
        # what they hold, but never assign them anew.
        self._options = options
        self._given_terms = terms = () if terms is None else check_terms(terms)
        if terms:
            options.check_terms(terms)
        self._layer_names = LayerNames(options.layers)
        self._reset_transient()
        super().__init__(params, {**defaults, "terms": terms, **options.state_meaning})

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the loss terms, in order; empty until they are known."""
        return tuple(self.param_groups[0]["terms"])

    @uninterrupted()
    def backward(
        self,
        losses: Losses,
        *,
        model: nn.Module | None = None,
        grad_output: Tensor | None = None,
        loss_scale: Tensor | None = None,
    ) -> None:
        """Differentiate each loss by itself and hold its gradients for :meth:`step`; in place of ``sum.backward()``.

        ``p.grad`` gets the sum over the terms, for whoever looks at it. Gradients add up over several calls until
        :meth:`step` consumes them, or :meth:`zero_grad` drops them.

        Args:
            losses: named scalar losses. Terms may be absent; a name that is not in :attr:`terms` is an error.
            model: the network as it is called. If ``DistributedDataParallel`` wraps it, the terms' gradients are
                averaged over its processes, which agree on the terms in every call; not within its ``no_sync()``, as
                long as batches accumulate. With parameters sharded by ``fully_shard`` they are always averaged. Needed
                only where several processes train together.
            grad_output: scalar by which every loss is multiplied, e.g. one over the number of accumulated batches.
            loss_scale: what a gradient scaler multiplied into ``grad_output``: the terms' gradients are divided by
                it, ``p.grad`` is not.

        Raises:
            ValueError: no losses, a loss that is no scalar, has no graph or reaches no parameter, an unknown name;
                the processes have different terms, or train different parameters.
            RuntimeError: another process has failed.
            TypeError: a loss that is no real floating-point tensor.
            NonFiniteError: a loss that is inf or nan, unless there is a ``loss_scale``.
        """
        parameters, pending = self._parameters(), self._pending
        pending.start_anew_if_reset(parameters)
        if loss_scale is not None:
            self._refuse_with_low_memory("a gradient scaler")
        if pending.absorbed is not None:
            self._refuse_with_low_memory("accumulation over several backward passes")
        batch = Batch(losses, parameters, model, grad_output, loss_scale, processes_of(model, parameters))
        taken = collect(batch, partial(self._check, batch), self._take, known=self.terms, pending=pending.terms)
        pending.terms = taken.collected
        if not self.terms:
            self._set_terms(taken.terms)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the collected gradients, and reset ``p.grad`` as every torch optimizer does.

        ``model.zero_grad()`` does the same; with ``set_to_none=False`` it goes unnoticed.
        """
        probed, self._pending.probed = self._pending.probed, False
        self._pending.clear()
        super().zero_grad(set_to_none)
        if probed:
            raise RuntimeError(
                "torch.distributed.checkpoint needs the optimizer's state, which there is not before the terms are"
                " known. Name them ahead: MTAdam(..., terms=(...)). Nothing was changed."
            )

    def skip_step(self) -> None:
        """Forget the collected gradients, and let the next :meth:`step` do nothing.

        For loops that step without a backward pass, as the last epoch of Lightning's stochastic weight averaging does.
        """
        self._pending.clear()
        self._pending.skip = True

    def clip_gradients(self, limit: float, algorithm: ClipAlgorithm = "norm") -> None:
        """Clip the balanced gradient, the sum over the terms, in the next :meth:`step`; clipping ``p.grad`` does nothing.

        All terms take the same factor, so that clipping does not disturb the balance.

        Args:
            limit: the largest L2 norm over all parameters ("norm"), or the largest magnitude of an entry ("value").
            algorithm: "norm" or "value".
        """
        if algorithm not in ("norm", "value"):
            raise ValueError(f"algorithm must be 'norm' or 'value', but got {algorithm!r}.")
        if not limit > 0:
            raise ValueError(f"limit must be above 0, but got {limit!r}.")
        self._refuse_with_low_memory("clipping")
        self._pending.clip = (algorithm, float(limit))

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Name the parameters that have no name yet, as ``model.named_parameters()`` does."""
        if None in self._layer_names.names:
            self._layer_names.name(named_parameters, self._parameters())

    def __getstate__(self) -> dict[str, Any]:
        mine = {key: self.__dict__[key] for key in ("_options", "_given_terms", "_layer_names")}
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_transient()

    def _reset_transient(self) -> None:
        self._pending = PendingGradients()
        self._last_scales: dict[str, Tensor] = {}

    @abstractmethod
    def _take(self, batch: Batch) -> None:
        """Differentiate the losses, and hold or consume their gradients."""

    def _refuse_with_low_memory(self, what: str) -> None:
        """Raise if gradients are consumed as soon as they are there, so that there can be no ``what``."""
        if self._options.low_memory:
            raise ValueError(
                f"low_memory=True consumes each term's gradient as soon as it is there, but {what} needs those of all"
                " terms at once. Leave out low_memory=True, or do without."
            )

    def _memory(self, rows: int) -> GradientMemory:
        """The memory that is there, if it fits."""
        parameters = self._parameters()
        parts = sharding.local_parts(parameters)
        groups = [id(group) for group in self.param_groups for _ in group["params"]]
        keys = [key if part is whole else None for key, part, whole in zip(groups, parts, parameters, strict=True)]
        trained = [parameter.requires_grad for parameter in parameters]
        return GradientMemory.fitting(self._pending.memory, parts, trained, keys, rows)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _check(self, batch: Batch) -> Parameters:
        finite = batch.loss_scale is None and self._options.on_nonfinite == "raise" and are_on_host(batch.parameters)
        check_losses(batch.losses, self.terms or None, finite=finite, graph=not batch.replicated)
        if not self._last_scales:  # what holds for the first step holds for all; and the last walks the whole graph
            self._options.check_terms(self.terms or tuple(batch.losses))
            refuse_reentrant_checkpoints(batch.losses)
        if self._layer_names.found is None:
            self._layer_names.layers(self.param_groups)
        if batch.processes.group is None:
            return ()
        named = zip(self._layer_names.labels, batch.parameters, strict=True)
        return tuple((name, tuple(parameter.shape)) for name, parameter in named if parameter.requires_grad)

    def _set_terms(self, terms: tuple[str, ...]) -> None:
        self.defaults["terms"] = terms
        for group in self.param_groups:
            group["terms"] = terms

    def _check_nothing_to_do(self, *, skipped: bool) -> None:
        """Raise, unless a closure has said by returning ``None`` that there is nothing to do, or ``skip_step`` has."""
        if self._pending.skip:
            return
        if self._is_probed():
            self._pending.probed = True
            return
        if not skipped or any(p.grad is not None and bool(p.grad.any()) for p in self._parameters()):
            raise RuntimeError(
                "step() has nothing to consume: it takes the gradients of the terms, not p.grad. Before every step()"
                " call optimizer.backward({'name': loss, ...}) in place of loss.backward(), or in a LightningModule"
                " under manual optimization self.backward_terms({'name': loss, ...}, optimizer)."
            )

    def _is_probed(self) -> bool:
        """Whether ``torch.distributed.checkpoint`` called ``step``, with zeros as gradients, so that there be a state.

        It has set the learning rates to zero until ``step`` returns; ``zero_grad`` is what it calls next.
        """
        gradients = [parameter.grad for parameter in self._parameters() if parameter.requires_grad]
        return (
            not any(self.state.values())
            and all(float(group["lr"]) == 0 for group in self.param_groups)
            and all(gradient is not None and not bool(gradient.any()) for gradient in gradients)
        )
