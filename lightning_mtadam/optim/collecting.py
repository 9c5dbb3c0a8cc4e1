"""An optimizer that is given the gradient of every term: what happens up to ``step``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_mtadam.distributed import sharding
from lightning_mtadam.distributed.agreement import Parameters, tell
from lightning_mtadam.distributed.averaging import Averaging, averaging_of
from lightning_mtadam.distributed.joint_terms import agree_on_terms
from lightning_mtadam.distributed.processes import Processes, processes_of
from lightning_mtadam.gradients import refuse_reentrant_checkpoints, sharded_term_gradients, term_gradients
from lightning_mtadam.lightning_internals import as_fabric_backward
from lightning_mtadam.optim.finite import is_host
from lightning_mtadam.optim.layers import LayerBook
from lightning_mtadam.optim.layout import TermMemory, fitting
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.pending import ClipAlgorithm, Found, PendingGradients
from lightning_mtadam.optim.schedule import SUM, weighted_sum
from lightning_mtadam.optim.uninterrupted import uninterrupted
from lightning_mtadam.terms import Losses, check_losses


class TermOptimizer(Optimizer):
    """Collects the gradients of named losses; a subclass consumes them in its ``step``.

    Args:
        params: as for every torch optimizer.
        defaults: of the parameter groups.
        options: what holds for the whole optimizer.
        terms: the names of the losses that are known ahead; empty if they are taken from the first losses.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: Options, terms: tuple[str, ...]) -> None:
        # Lightning wraps optimizers in an object that has this class but not these attributes: methods may change
        # what they hold, but never assign them anew.
        self._options = options
        self._given_terms = terms
        self._book = LayerBook(options.layers)
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
        parameters = self._parameters()
        self._pending.start_anew_if_reset(parameters)
        if loss_scale is not None:
            self._refuse_if_streaming("a gradient scaler")
        if self._pending.streaming is not None:
            self._refuse_if_streaming("accumulation over several backward passes")
        processes = processes_of(model, parameters)
        terms, absent = self._check(losses, loss_scale, processes, model)
        rows = self.terms or terms
        order = self._in_order(rows)
        present: Losses = {name: losses[name] for name in order if name in losses and name not in absent}
        factors = self._factors(terms, agreed=processes.group is None or processes.averages)
        if factors is not None:
            present, rows = weighted_sum(present, factors), (SUM,)
        replicated = processes.group is not None and not processes.sharded
        averaging = averaging_of(processes)
        if processes.sharded:
            assert model is not None
            found = sharded_term_gradients(present, parameters, model, grad_output=grad_output)
        else:
            found = term_gradients(present, parameters, grad_output=grad_output)
        try:
            with as_fabric_backward():
                self._collect(found, tuple(present), rows, loss_scale, averaging, may_miss=replicated)
        except Exception as error:
            if averaging is not None:
                tell(error, averaging.group)
            raise
        self._pending.terms = terms
        self._set_terms(self.terms or terms)

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

        For loops that call ``step`` though there was no backward pass, as in the last epoch of Lightning's stochastic
        weight averaging.
        """
        self._pending.clear()
        self._pending.skip = True

    def clip_gradients(self, limit: float, algorithm: ClipAlgorithm = "norm") -> None:
        """Clip the balanced gradient, the sum over the terms, in the next :meth:`step`.

        All terms take the same factor, so that clipping does not disturb the balance. Clipping ``p.grad`` has no
        effect here.

        Args:
            limit: the largest L2 norm over all parameters ("norm"), or the largest magnitude of an entry ("value").
            algorithm: "norm" or "value".
        """
        if algorithm not in ("norm", "value"):
            raise ValueError(f"algorithm must be 'norm' or 'value', but got {algorithm!r}.")
        if not limit > 0:
            raise ValueError(f"limit must be above 0, but got {limit!r}.")
        self._refuse_if_streaming("clipping")
        self._pending.clip = (algorithm, float(limit))

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Name the parameters that have no name yet, as ``model.named_parameters()`` does."""
        self._book.name(named_parameters, self._parameters())

    def __getstate__(self) -> dict[str, Any]:
        mine = {key: self.__dict__[key] for key in ("_options", "_given_terms", "_book")}
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_transient()

    def _reset_transient(self) -> None:
        self._pending = PendingGradients()
        self._last_scales: dict[str, Tensor] = {}

    def _collect(
        self,
        found: Found,
        names: tuple[str, ...],
        rows: tuple[str, ...],
        loss_scale: Tensor | None,
        averaging: Averaging | None,
        *,
        may_miss: bool,
    ) -> None:
        """Hold the gradients that are found. The arguments are those of ``PendingGradients.collect``."""
        self._pending.use(self._memory(len(self.terms if rows == (SUM,) else rows)), rows)
        self._pending.collect(found, names, rows, self._parameters(), loss_scale, averaging, may_miss)
        self._pending.show_sum(self._parameters(), loss_scale)

    def _in_order(self, terms: tuple[str, ...]) -> tuple[str, ...]:
        """The terms in the order in which they are differentiated."""
        return terms

    def _refuse_if_streaming(self, what: str) -> None:
        """Raise if gradients are consumed as soon as they are there, so that there can be no ``what``."""

    def _factors(self, terms: Sequence[str], *, agreed: bool) -> Mapping[str, Tensor] | None:
        """By what to multiply the losses, if their sum alone is to be differentiated; ``None``: each by itself.

        Args:
            terms: the terms of this batch and of what is pending.
            agreed: whether they are those of all processes.
        """
        return None

    def _memory(self, rows: int) -> TermMemory:
        """The memory that is there, if it fits."""
        parameters = [sharding.local(parameter) for parameter in self._parameters()]
        trained = [parameter.requires_grad for parameter in self._parameters()]
        keys = [
            None if sharding.is_sharded(parameter) else id(group)
            for group in self.param_groups
            for parameter in group["params"]
        ]
        return fitting(self._pending.memory, parameters, trained, keys, rows)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _check(
        self, losses: Losses, loss_scale: Tensor | None, processes: Processes, model: nn.Module | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """As ``agree_on_terms``."""
        graph = processes.group is None or processes.sharded  # of replicated processes, one may have a constant term

        def check() -> Parameters:
            finite = loss_scale is None and self._options.on_nonfinite == "raise" and self._is_on_host()
            check_losses(losses, self.terms or None, finite=finite, graph=graph)
            self._options.check_terms(self.terms or tuple(losses))
            self._book.layers(self.param_groups)
            if not self._last_scales:  # a walk over the whole graph: before the first step only
                refuse_reentrant_checkpoints(losses)
            return self._trained()

        pending = self._pending.terms
        return agree_on_terms(losses, check, pending=pending, known=self.terms, processes=processes, model=model)

    def _is_on_host(self) -> bool:
        """Whether to look at the losses already: an accelerator would have to be waited for."""
        return all(is_host(parameter.device) for parameter in self._parameters())

    def _trained(self) -> Parameters:
        named = zip(self._book.labels, self._parameters(), strict=True)
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
