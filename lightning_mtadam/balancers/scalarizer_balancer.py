"""Scalarizers of TorchJD, on the losses themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mtadam.balancers.aggregator_memory import is_of_torchjd
from lightning_mtadam.balancers.balancer import parameters_in
from lightning_mtadam.balancers.batch import Batch, wide
from lightning_mtadam.balancers.importance import WeighsTerms
from lightning_mtadam.balancers.scalarizer_memory import Outcome, Scalarizer, ScalarizerMemory
from lightning_mtadam.constants import constant
from lightning_mtadam.distributed.averaging import mean_over
from lightning_mtadam.distributed.processes import Processes
from lightning_mtadam.terms import Losses, check_losses, is_host, plain

_OWN = ("weights", "present", "steps", "updated")


class ScalarizerBalancer(WeighsTerms):
    r"""The gradient of the one loss that a scalarizer of TorchJD (FAMO, DWA, IMTL-L, STCH, ...) makes of the losses.

    With ``s`` the scalarizer, of the I losses, means over all processes::

        w_i    = ds / dL_i
        p.grad = sum_i importance_i w_i grad L_i           one backward pass

    A term that is absent in a step has no part in it: the scalarizer is run on the others, with what it remembers of
    them. One that compares epochs (DWA) needs every term in every step.

    **FAMO** learns from the losses after the step. By default those of the next step stand for them, which costs
    nothing; :meth:`update` tells it those of the same batch, as in the paper. **DWA** learns at the end of an epoch, of
    which the trainer tells it; without Lightning call :meth:`end_epoch`. What an optimizer is to learn (IMTL-L, UW) is
    the module ``learned``: a :class:`~lightning_mtadam.MultiTermLightningModule` registers it, and the optimizer that
    is given ``self.parameters()`` learns it.

    Under accumulation every batch is weighed at the mean of the step's losses so far; what is remembered moves once a
    step, as if the batches were one.

    Args:
        scalarizer: of ``torchjd.scalarization``, e.g. ``FAMO(2)``; or whatever makes a scalar with a graph of values
            [I]. It is this balancer's alone.
        seed: of what is drawn.
        terms: the names of the losses, if known ahead.

    Raises:
        TypeError: the scalarizer cannot be called, is an aggregator, or does not make a scalar tensor.
        ValueError: it is made for another number of terms; a loss that it has no finite weight for, such as one of zero
            where it takes a logarithm; the optimizer does not hold what it learns; parameters are sharded.

    Example:
        >>> from torchjd.scalarization import GeometricMean
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> model = nn.ParameterList([w])
        >>> balancer = ScalarizerBalancer(GeometricMean())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> balancer.backward({"small": w[0] ** 2, "large": 4 * w[1] ** 2}, optimizer, model=model)
        >>> w.grad  # of 2 w[0] w[1]
        tensor([4., 2.])
        >>> balancer.term_weights()
        {'small': tensor(2.), 'large': tensor(0.1250)}

    References:
        https://torchjd.org names the source of each scalarizer. There FAMO is told the losses after the step on the
        same batch, which takes another forward pass.
    """

    def __init__(self, scalarizer: Scalarizer, seed: int = 0, terms: Iterable[str] | None = None) -> None:
        super().__init__(terms)
        if is_of_torchjd(scalarizer, "aggregation", "Aggregator"):
            raise TypeError(
                f"{type(scalarizer).__name__} is an aggregator, which makes a gradient of gradients. Give it to"
                f" TorchJDBalancer: TorchJDBalancer({type(scalarizer).__name__}(...))."
            )
        if not callable(scalarizer):
            raise TypeError(
                f"scalarizer must make a scalar of the losses, but a {type(scalarizer).__name__} cannot be called. Give"
                " e.g. torchjd.scalarization.GeometricMean()."
            )
        self.scalarizer, self.seed = scalarizer, plain(seed)
        self._memory = ScalarizerMemory(scalarizer)
        if self._memory.learned:
            assert isinstance(scalarizer, nn.Module)
            self.learned = scalarizer.requires_grad_(False)
        self._observed = torch.empty(0)  # in this step so far: presence and loss, [2, I]
        self._in_step: set[str] = set()  # the terms of this step so far
        self._processes = Processes()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_processes": Processes()}

    def place(self, value: Tensor, device: torch.device) -> Tensor:
        """As it is: a scalarizer also keeps numbers, which are the host's."""
        return value

    def term_weights(self) -> dict[str, Tensor]:
        """What multiplied each loss in the last batch, 0 for absent terms."""
        if "weights" not in self.state:
            return {}
        return dict(zip(self._terms, self.state["weights"].unbind(), strict=True))

    def update(self, losses: Losses) -> None:
        """Tell the scalarizer the losses after the step, on the batch of the step (FAMO); they need no graph.

        Where no step was taken since the last backward pass, as while batches accumulate, it does nothing. In a module
        ``on_train_batch_end`` is the place: ``self.balancer.update(self.training_step(batch, batch_idx))``.

        Args:
            losses: named scalar losses.

        Raises:
            TypeError: the scalarizer does not go by them.
            ValueError: an unknown term, or a loss that it cannot take.
            NonFiniteError: a loss that is inf or nan.
        """
        if not self._memory.updates:
            name = type(self.scalarizer).__name__
            raise TypeError(f"{name} does not go by the losses after a step: it has no method update. Leave it out.")
        if not self._steps.ended or "updated" not in self.state or bool(self.state["updated"]):
            return
        losses = {name: loss.clone() if isinstance(loss, Tensor) else loss for name, loss in losses.items()}
        for loss in losses.values():
            if isinstance(loss, Tensor) and loss.is_floating_point() and not loss.requires_grad:
                loss.requires_grad_()  # which a loss that is differentiated must have
        check_losses(losses, self._terms, finite=is_host(self.state["weights"].device))
        places = [at for at, name in enumerate(self._terms) if name in losses]
        values = torch.stack([losses[self._terms[at]].detach().to(self.state["weights"]) for at in places])
        if self._processes.group is not None:
            values = mean_over(values, self._processes.group)
        self.state = self._updated(values, places, self.state)

    def end_epoch(self) -> None:
        """As of every balancer: a scalarizer that compares epochs (DWA) takes its step."""
        state = self.state if self._steps.ended else self.state_before
        if self._compares_epochs and state:
            remembered = self._memory.end_epoch(torch.ones_like(state["weights"]), state)
            self.state = self.state_before = {**_own(state), **remembered}

    @property
    def _compares_epochs(self) -> bool:
        return callable(getattr(self.scalarizer, "step", None))

    def check(self, batch: Batch, optimizer: Optimizer) -> None:
        """As of every balancer."""
        super().check(batch, optimizer)
        held, name = {id(parameter) for parameter in parameters_in(optimizer)}, type(self.scalarizer).__name__
        if any(id(parameter) not in held for parameter in self._memory.learned):
            raise ValueError(
                f"The optimizer does not hold what {name} learns, so it would stay as it is. In configure_optimizers"
                " give it all of self.parameters(), also those without requires_grad; without Lightning add"
                " balancer.learned.parameters()."
            )
        absent = [term for term in self._terms if term not in batch.losses]
        if self._compares_epochs and absent:
            raise ValueError(
                f"{name} compares the mean of every loss over an epoch with that of the epoch before, but the losses"
                f" lack {absent}. Return every term in every step, or take another scalarizer."
            )

    def balance(self, batch: Batch) -> None:
        """As of every balancer."""
        self._processes, terms = batch.processes, batch.terms
        dtype = wide(next(iter(batch.losses.values())).dtype)
        zero, share = batch.factor.new_zeros(2, dtype=dtype), batch.share.to(dtype)
        found = {name: torch.stack([share, share * loss.detach().to(dtype)]) for name, loss in batch.losses.items()}
        observed, present = torch.stack([found.get(name, zero) for name in terms], 1), set(found)
        if not batch.begins and not self._memory.learned:  # what is learned gets each batch's own gradient
            observed, present = observed + self._observed, present | self._in_step
        places = [at for at, name in enumerate(terms) if name in present]
        shares, sums = batch.mean_of_all(observed)[:, places].unbind()
        values, state = sums / shares, self.state_before
        if is_host(values.device) and not bool(values.isfinite().all()):  # for a gradient scaler to skip
            after, weights = dict(state), torch.full_like(observed[0], torch.nan)
            learned = [torch.full_like(parameter, torch.nan) for parameter in self._memory.learned]
        else:
            if "updated" in state and not bool(state["updated"]):
                state = self._updated(values, places, state)
            outcome = self._outcome(values, places, terms, state)
            weights = torch.zeros_like(observed[0])
            weights[places] = outcome.weights.to(dtype)
            factors = constant(self.importance_of(terms), dtype, weights.device)
            weights, learned = weights * factors, outcome.learned
            after = self._after(outcome, weights, places, state)
        batch.run_weighted(weights)
        for parameter, gradient in zip(self._memory.learned, learned, strict=True):
            scaled = (gradient * batch.factor).to(parameter)
            parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled
        self._observed, self._in_step, self.state = observed, present, after

    def _outcome(self, values: Tensor, places: list[int], terms: Sequence[str], state: dict[str, Tensor]) -> Outcome:
        """What the scalarizer makes of the values, checked."""
        names, seed = [terms[at] for at in places], f"{self.seed}/{int(state['steps']) if state else 0}"
        if is_host(values.device):
            self._check_bounds(names, values)
        try:
            outcome = self._memory.call(values, places, len(terms), state, seed)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{type(self.scalarizer).__name__} cannot take the losses {_shown(names, values)}: {error} It must be"
                " made for all the terms; name those that come later ahead, ScalarizerBalancer(..., terms=(...))."
            ) from error
        if is_host(values.device) and not bool(torch.stack([outcome.value, *outcome.weights]).isfinite().all()):
            raise ValueError(
                f"{type(self.scalarizer).__name__} has no finite weights for the losses {_shown(names, values)}. Where"
                " a scalarizer takes logarithms, losses must be above 0: leave out a term in the steps in which it is"
                " zero, or take another scalarizer."
            )
        return outcome

    def _after(
        self, outcome: Outcome, weights: Tensor, places: list[int], state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state after a batch; the same if what was remembered on an accelerator is not finite."""
        present = torch.zeros(len(weights), dtype=torch.bool, device="cpu")
        present[places] = True
        steps = state["steps"] + 1 if state else torch.ones((), dtype=torch.int64, device="cpu")
        after = {**outcome.state, "weights": weights.detach(), "present": present, "steps": steps}
        if self._memory.updates:
            after["updated"] = torch.zeros((), dtype=torch.bool, device="cpu")
        if is_host(weights.device):
            return after
        finite = torch.cat([outcome.value[None], outcome.weights]).isfinite().all()
        kept = {key for key, value in after.items() if key in state and state[key].shape == value.shape}
        kept = {key for key in kept if not is_host(after[key].device)}
        return {key: torch.where(finite, one, state[key].to(one)) if key in kept else one for key, one in after.items()}

    def _updated(self, values: Tensor, places: list[int], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state after the scalarizer was told the values after the step, [n], of the terms at these places."""
        was = [at for at, flag in enumerate(state["present"].tolist()) if flag]
        both = [at for at in was if at in places]
        own = {**_own(state), "updated": torch.ones((), dtype=torch.bool, device="cpu")}
        if not both:
            return {**state, **own}
        told = values[[places.index(at) for at in both]]
        if is_host(values.device):
            self._check_bounds([self._terms[at] for at in both], told)
        return {**own, **self._memory.update(told, both, len(state["present"]), state)}

    def _check_bounds(self, names: Sequence[str], values: Tensor) -> None:
        """Raise where a loss is not above the bound that the scalarizer subtracts before it takes the logarithm."""
        bounds = getattr(self.scalarizer, "min_losses", None)
        if not isinstance(bounds, Tensor):
            return
        terms = self._terms or tuple(names)
        if len(bounds) != len(terms):
            return  # the call says so
        for name, value in zip(names, values.tolist(), strict=True):
            bound = float(bounds[terms.index(name)])
            if value <= bound:
                raise ValueError(
                    f"losses[{name!r}] is {value}, but {type(self.scalarizer).__name__} takes the logarithm of what it"
                    f" is above {bound}. Give a lower bound, min_losses, leave the term out where it is zero, or take"
                    " another scalarizer."
                )


def _own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of the state that is the balancer's, not the scalarizer's."""
    return {key: state[key] for key in _OWN if key in state}


def _shown(names: Sequence[str], values: Tensor) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
