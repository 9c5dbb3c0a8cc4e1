"""Refuses functions that couple the samples of a batch, where they are run on a part of its rows."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_TRAINING = 5
"""The position of ``training`` among the arguments of each of ``_BATCH_NORMS``."""

_BATCH_NORMS = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)


class _CoupledSamplesError(Exception):
    """Carries the traceback from which the module is named."""


class _Refusal(TorchFunctionMode):
    """Raises where a batch is normalised by its own mean and variance.

    It sees what is called, not which modules there are: BatchNorm in evaluation mode passes, and so does
    InstanceNorm, which normalises each sample by itself. ``torch.compile`` traces through it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func in _BATCH_NORMS:
            if named.get("training", len(args) > _TRAINING and args[_TRAINING]):
                raise _CoupledSamplesError
        elif func is torch.batch_norm_stats:  # how SyncBatchNorm begins
            raise _CoupledSamplesError
        return func(*args, **named)


@contextmanager
def refusing_coupled_samples() -> Iterator[None]:
    """Raise if the samples of a batch are coupled by batch normalisation in what is run within.

    Raises:
        ValueError: naming the module, with the reason and what to do.

    Example:
        >>> with refusing_coupled_samples():
        ...     _ = nn.BatchNorm1d(3).eval()(torch.ones(2, 3))
        >>> with refusing_coupled_samples():  # doctest: +ELLIPSIS
        ...     _ = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))(torch.ones(2, 3))
        Traceback (most recent call last):
            ...
        ValueError: '1' (BatchNorm1d) normalises by the mean and variance of the batch, ...
    """
    try:
        with _Refusal():
            yield
    except _CoupledSamplesError as refused:
        raise ValueError(
            f"{_module_in(refused)} normalises by the mean and variance of the batch, so what it makes of a row depends"
            " on the rows of other terms. Call its .eval() in every training step, use e.g. nn.GroupNorm instead, or"
            " return the terms of one pass over the whole batch."
        ) from None


def _module_in(error: Exception) -> str:
    """The innermost module that was running, by its name in the outermost one."""
    selves = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [found for found in selves if isinstance(found, nn.Module)]
    if not modules:
        return "batch_norm(training=True)"
    name = next((name for name, module in modules[0].named_modules() if module is modules[-1]), "")
    kind = type(modules[-1]).__name__
    return f"{name!r} ({kind})" if name else kind
