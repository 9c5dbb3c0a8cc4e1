"""One step of MTAdam: norms, balance, clocks, then the update of every bucket of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_mtadam import balancing
from lightning_mtadam.distributed import sharding
from lightning_mtadam.optim.kernels import Bucket, Coefficients, Hyperparameters, balanced_norm, update
from lightning_mtadam.optim.layers import Layers
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.pending import Gradients, PendingGradients
from lightning_mtadam.optim.state import State, balance_dtype, read_rows, write_rows
from lightning_mtadam.terms import NonFiniteError


class Stepper:
    """The stages of one step over the parameters that have a state: ``P`` of them, in ``L`` layers, with ``I`` terms.

    Args:
        options: the optimizer's options.
        groups: its parameter groups.
        state: its state by parameter.
        layers: the layers of all its parameters.
        parameter_names: the names of all its parameters, for messages.
        terms: the names of the terms.
    """

    def __init__(
        self,
        options: Options,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, State],
        layers: Layers,
        parameter_names: Sequence[str],
        terms: tuple[str, ...],
    ) -> None:
        parameters = [parameter for group in groups for parameter in group["params"]]
        self.options = options
        self.terms = terms
        self.members = [index for index, parameter in enumerate(parameters) if state.get(parameter)]
        whole = [parameters[index] for index in self.members]
        self.parameters = [sharding.local(parameter) for parameter in whole]
        self.shardings = [sharding.sharding_of(parameter) for parameter in whole]
        self.states = [{key: sharding.local(value) for key, value in state[parameter].items()} for parameter in whole]
        owners = [group for group in groups for _ in group["params"]]
        self.groups = [owners[index] for index in self.members]
        self.names = [parameter_names[index] for index in self.members]
        self.like = torch.empty((), dtype=balance_dtype(self.parameters), device=self.parameters[0].device)
        self.layers = layers
        self.single = len(self.members) == len(parameters) == len(layers.names)
        self.layer_of = layers.layer_of.to(self.like.device)
        if len(self.members) < len(parameters):
            self.layer_of = self.layer_of[_constant(tuple(self.members), torch.int64, self.like.device)]

    def step(self, pending: PendingGradients) -> Tensor:
        """Consume the pending gradients.

        Returns:
            The scales, [L, I].

        Raises:
            NonFiniteError: a gradient is inf or nan; nothing was changed.
        """
        gradients = [self._of_members(pending.gradients.get(term)) for term in self.terms]
        touched = [any(gradient is not None for gradient in column) for column in zip(*gradients, strict=True)]
        observed = self.parameter_norms(gradients)
        self._check_finite(observed)
        norms, counts = self._update_norms(observed, touched, [term in pending.gradients for term in self.terms])
        scales = self.scales(norms, counts)
        buckets = list(self._buckets(gradients, touched))
        if pending.clip is not None and pending.clip[0] == "norm":
            scales = scales * self._clip_factor(buckets, scales, pending.clip[1])
        clocks = read_rows(self.states, "step", self.like)
        clocks = balancing.tick(clocks, observed > 0, _constant(tuple(touched), torch.bool, self.like.device)[:, None])
        write_rows(self.states, "step", clocks)
        clip_value = pending.clip[1] if pending.clip is not None and pending.clip[0] == "value" else None
        for positions, bucket in buckets:
            group = self.groups[positions[0]]
            coefficients = self._coefficients(positions, bucket, scales, clocks, group)
            update(bucket, coefficients, self._hyperparameters(group), clip_value)
        return scales

    def parameter_norms(self, gradients: Sequence[Gradients]) -> Tensor:
        """The L2 norms of the gradients, zero where there is none: I lists of P -> [P, I]   (Alg. 1)."""
        flat = [gradient for column in zip(*gradients, strict=True) for gradient in column]
        norms = iter(torch._foreach_norm([g for g in flat if g is not None], 2.0, dtype=self.like.dtype))
        zero = self.like.new_zeros(())
        rows = torch.stack([zero if gradient is None else next(norms).to(self.like) for gradient in flat])
        rows = rows.view(len(self.parameters), len(gradients))
        for cut in dict.fromkeys(self.shardings):  # in one order on all processes
            if cut is None:
                continue
            members = [position for position, other in enumerate(self.shardings) if other == cut]
            index = _constant(tuple(members), torch.int64, self.like.device)
            rows[index] = sharding.join_norms(rows[index], cut)
        return rows

    def scales(self, norms: Tensor, counts: Tensor) -> Tensor:
        """The scales from the moving averages: [L, I] -> [L, I]   (Alg. 1)."""
        norms = balancing.corrected_norms(norms, counts, self._beta3(), self.options.norm_init)
        importance = [float(self.options.importance.get(term, 1)) for term in self.terms]
        return balancing.balance_scales(
            norms,
            self.options.target_norms(norms, self.terms),
            _constant(tuple(importance), self.like.dtype, self.like.device),
            self.options.max_scale,
        )

    def read_norms(self) -> tuple[Tensor, Tensor]:
        """The moving averages of the layers' norms, and how many norms they average: [L, I] each."""
        keys = ("gradient_norm", "gradient_norm_count")
        norms, counts = (self._by_layer(read_rows(self.states, key, self.like)) for key in keys)
        return norms, counts

    def corrected_norms(self) -> Tensor:
        """The gradient norms n_i as the balance uses them: [L, I]."""
        return balancing.corrected_norms(*self.read_norms(), self._beta3(), self.options.norm_init)

    def _update_norms(
        self, observed: Tensor, touched: Sequence[bool], present: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        device = self.like.device
        layer_touched = self._by_layer(_constant(tuple(touched), self.like.dtype, device)[:, None]) > 0
        norms, counts = balancing.update_norms(
            *self.read_norms(),
            observed if self.single else balancing.layer_norms(observed, self.layer_of, len(self.layers.names)),
            layer_touched & _constant(tuple(present), torch.bool, device),
            self._beta3(),
            self.options.norm_init,
        )
        write_rows(self.states, "gradient_norm", norms[self.layer_of])
        write_rows(self.states, "gradient_norm_count", counts[self.layer_of])
        return norms, counts

    def _by_layer(self, rows: Tensor) -> Tensor:
        return balancing.by_layer(rows, self.layer_of, len(self.layers.names))

    def _beta3(self) -> Tensor:
        """Scalar; or [L, 1] where groups differ: a layer that spans groups takes the largest."""
        decays = tuple(float(group["betas"][2]) for group in self.groups)
        if len(set(decays)) == 1:
            return torch.tensor(decays[0], dtype=torch.float64)
        return self._by_layer(_constant(decays, self.like.dtype, self.like.device)[:, None])

    def _check_finite(self, observed: Tensor) -> None:
        if not bool(observed.isfinite().all()):
            row, column = (int(index) for index in (~observed.isfinite()).nonzero()[0])
            raise NonFiniteError(
                f"The gradient of the term {self.terms[column]!r} at the layer {self.names[row]!r} is not finite: its"
                f" norm is {float(observed[row, column])} in {observed.dtype}. Nothing was changed. Look for a division"
                " by zero or a root of zero in that loss, or lower the learning rate."
            )

    def _clip_factor(self, buckets: Sequence[tuple[list[int], Bucket]], scales: Tensor, limit: float) -> Tensor:
        rows = scales[self.layer_of]
        parts = [
            sharding.join_norms(
                balanced_norm(bucket, self._select(rows, positions, bucket).T), self.shardings[positions[0]]
            )
            for positions, bucket in buckets
        ]
        norm = torch.linalg.vector_norm(torch.stack([part.to(self.like) for part in parts]))
        factor: Tensor = limit / (norm + 1e-6)
        return factor.clamp(max=1)  # as torch.nn.utils.clip_grad_norm_

    def _buckets(self, gradients: Sequence[Gradients], touched: Sequence[bool]) -> Iterator[tuple[list[int], Bucket]]:
        """The touched parameters, joined by what they share, with their positions among the members."""
        together: dict[tuple[object, ...], list[int]] = {}
        for position, parameter in enumerate(self.parameters):
            if touched[position]:
                key = (id(self.groups[position]), parameter.device, parameter.dtype, self.shardings[position])
                together.setdefault(key, []).append(position)
        for positions in together.values():
            states = [self.states[position] for position in positions]
            yield (
                positions,
                Bucket(
                    parameters=[self.parameters[position] for position in positions],
                    gradients=[[row[position] for position in positions] for row in gradients],
                    exp_avg=[state["exp_avg"] for state in states],
                    exp_avg_sq=[state["exp_avg_sq"] for state in states],
                    max_exp_avg_sq=[state["max_exp_avg_sq"] for state in states if "max_exp_avg_sq" in state],
                ),
            )

    def _coefficients(
        self, positions: list[int], bucket: Bucket, scales: Tensor, clocks: Tensor, group: Mapping[str, Any]
    ) -> Coefficients:
        own_moments = self.options.denominator == "own"
        scales = self._select(scales[self.layer_of], positions, bucket).T
        clocks = self._select(clocks, positions, bucket).T
        shared, own = clocks[0], clocks[1:]
        beta1, beta2 = (torch.tensor(float(beta), dtype=torch.float64) for beta in group["betas"][:2])
        reaching = (own > 0).sum(0).to(scales)
        return Coefficients(
            scales=scales,
            first=1 / balancing.bias_correction(own if own_moments else shared, beta1),
            second=torch.where(own > 0, 1 / balancing.bias_correction(own, beta2), 0),
            share=reaching.clamp(min=1) if self.options.update == "mean" else torch.ones_like(reaching),
            reaching=reaching,
        )

    def _select(self, rows: Tensor, positions: list[int], bucket: Bucket) -> Tensor:
        """The rows at these positions, on the bucket's device."""
        if len(positions) < len(rows):
            rows = rows[_constant(tuple(positions), torch.int64, rows.device)]
        return rows.to(bucket.parameters[0].device)

    def _hyperparameters(self, group: Mapping[str, Any]) -> Hyperparameters:
        beta1, beta2, _ = group["betas"]
        numbers = {key: group[key] for key in ("lr", "eps", "weight_decay", "maximize")}
        return Hyperparameters(beta1=beta1, beta2=beta2, denominator=self.options.denominator, **numbers)

    def _of_members(self, gradients: Gradients | None) -> list[Tensor | None]:
        return [None if gradients is None else gradients[index] for index in self.members]


@lru_cache(maxsize=1024)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant on the device; kept, so that it travels there once."""
    return torch.tensor(values, dtype=dtype, device=device)
