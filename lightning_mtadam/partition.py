"""Losses of terms that partition the batch: each row belongs to one term, so that all terms pass over it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mtadam.coupling import refusing_coupled_samples
from lightning_mtadam.distributed.sharding import holds_shards
from lightning_mtadam.terms import check_terms

Batch: TypeAlias = "Tensor | Sequence[Tensor] | Mapping[str, Tensor]"
"""What is cut into rows: a tensor, or several with the same first dimension."""


def partitioned_losses(
    function: Callable[..., Tensor], batch: Batch, term_of_row: Tensor, terms: Sequence[str]
) -> dict[str, Tensor]:
    """Run a function once per term, on the rows of that term only.

    Each term gets a small graph of its own, so that the backward passes of all terms together pass over every row
    once, where terms of one graph pass over the whole batch once each::

        losses[i] = sum of function(rows of term i) / B

    Their sum is the mean over the batch. A term without rows is left out. Where several processes run, it is a
    constant zero instead, which counts as absent on that process.

    Dropout draws other random numbers than in one pass over the batch. How many rows each term has is read on the
    host, which waits for ``term_of_row`` if that is on an accelerator.

    Args:
        function: takes rows of the batch, as its arguments, in the order of the batch: one argument for a tensor,
            positional ones for a sequence, keyword arguments for a mapping. Returns one loss per row: n rows -> [n].
        batch: tensors [B, ...].
        term_of_row: int64 [B], the index into ``terms`` of the term that a row belongs to.
        terms: the names of the I terms.

    Returns:
        A scalar per term, in the order of ``terms``.

    Raises:
        TypeError: the batch holds something else than tensors; ``term_of_row`` is no int64 tensor; the function
            returns no floating-point tensor; the names are no strings.
        ValueError: shapes that do not fit, an index out of range, an empty batch, names twice; the function does not
            return one loss per row; it couples the rows by batch normalisation; its network is sharded.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> def errors(x, y):
        ...     return (network(x) - y).square().flatten(1).sum(1)
        >>> x, y, source = torch.randn(5, 2), torch.randn(5, 1), torch.tensor([1, 0, 1, 1, 0])
        >>> losses = partitioned_losses(errors, (x, y), source, ("measured", "simulated"))
        >>> list(losses)
        ['measured', 'simulated']
        >>> torch.allclose(losses["measured"] + losses["simulated"], errors(x, y).mean())
        True
    """
    names = check_terms(terms)
    tensors = _tensors(batch)
    _check_rows(tensors, term_of_row)
    _refuse_shards(function)
    order, counts = _in_order(term_of_row, names)
    pieces = [torch.split(tensor.index_select(0, order.to(tensor.device)), counts) for tensor in tensors.values()]
    losses: dict[str, Tensor] = {}
    with refusing_coupled_samples():
        for name, count, *rows in zip(names, counts, *pieces, strict=True):
            if count:
                named = isinstance(batch, Mapping)
                per_row = function(**dict(zip(tensors, rows, strict=True))) if named else function(*rows)
                _check_per_row(per_row, name, count)
                losses[name] = per_row.sum() / len(term_of_row)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        zero = next(iter(losses.values())).detach().new_zeros(())
        losses = {name: losses.get(name, zero) for name in names}
    return losses


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """The batch's tensors, by what messages call them, or by their names."""
    if isinstance(batch, Tensor):
        return {"batch": batch}
    if isinstance(batch, Mapping):
        tensors = dict(batch)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        tensors = {f"batch[{index}]": tensor for index, tensor in enumerate(batch)}
    else:
        raise TypeError(f"batch must be a tensor, or a sequence or mapping of tensors, but is a {_kind(batch)}.")
    for where, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"Everything in batch must be a tensor with a row for each sample, but {where!r} is a {_kind(tensor)}."
                " Give what is no tensor to the function in another way, e.g. with functools.partial."
            )
    return tensors


def _check_rows(tensors: Mapping[str, Tensor], term_of_row: Tensor) -> None:
    if not isinstance(term_of_row, Tensor):
        raise TypeError(f"term_of_row must be a tensor of int64, but is a {_kind(term_of_row)}. Use torch.tensor(...).")
    if term_of_row.dtype != torch.int64:
        raise TypeError(
            f"term_of_row must hold int64 indices into terms, but has dtype {term_of_row.dtype}. Convert it with"
            " .long()."
        )
    if term_of_row.dim() != 1:
        raise ValueError(
            f"term_of_row must have one index for each row, shape (B,), but has shape {tuple(term_of_row.shape)}."
            " From one-hot rows, e.g., .argmax(1) makes it."
        )
    if not len(term_of_row):
        raise ValueError("term_of_row is empty: there is no row in the batch. Leave empty batches out.")
    if not tensors:
        raise ValueError("batch holds no tensors. Give at least one, from which the function computes its losses.")
    for where, tensor in tensors.items():
        if not tensor.dim() or len(tensor) != len(term_of_row):
            raise ValueError(
                f"{where!r} must have the {len(term_of_row)} rows of term_of_row, but has shape {tuple(tensor.shape)}."
                " Give what is the same for all rows to the function in another way, e.g. with functools.partial."
            )


def _refuse_shards(function: Callable[..., Tensor]) -> None:
    """Each forward pass of a sharded network needs all processes, but they may have different terms."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module) and holds_shards(owner):
        raise ValueError(
            "The network is sharded, so that every forward pass needs all processes, but each process runs one for"
            " every term that its own rows have. Use strategy='ddp', or return the terms of one pass over the whole"
            " batch."
        )


def _in_order(term_of_row: Tensor, names: tuple[str, ...]) -> tuple[Tensor, list[int]]:
    """Bring the rows of each term together.

    Args:
        term_of_row: int64 [B].
        names: of the I terms.

    Returns:
        The rows in the terms' order, and in their own within a term, [B]; the number of rows of each term, [I].
    """
    ordered, order = term_of_row.sort(stable=True)
    # where each term's rows begin, and where the last one's end: all that the host reads
    bounds = torch.searchsorted(ordered, torch.arange(len(names) + 1, device=ordered.device)).tolist()
    if bounds[0] > 0 or bounds[-1] < len(ordered):
        raise ValueError(
            f"term_of_row holds indices from {int(ordered[0])} to {int(ordered[-1])}, but the {len(names)} terms have 0"
            f" to {len(names) - 1}. Name a term for each index, and leave rows that belong to none out of the batch."
        )
    return order, [end - begin for begin, end in pairwise(bounds)]


def _check_per_row(per_row: object, name: str, count: int) -> None:
    if not isinstance(per_row, Tensor) or not per_row.is_floating_point():
        got = f"dtype {per_row.dtype}" if isinstance(per_row, Tensor) else f"a {_kind(per_row)}"
        raise TypeError(f"The function must return a floating-point tensor, one loss per row, but returned {got}.")
    if per_row.shape != (count,):
        raise ValueError(
            f"The function must return one loss per row, for the {count} rows of the term {name!r} a tensor of shape"
            f" ({count},), but returned shape {tuple(per_row.shape)}. Leave out the reduction over rows, e.g. with"
            " reduction='none', and reduce all other dimensions, e.g. with .flatten(1).mean(1)."
        )


def _kind(value: object) -> str:
    return type(value).__name__
