"""What the balance is called in logs: the tags, and what each of them means.

A prefix, ``balance_weight`` or ``balance_weight-MTAdam-1``, tells several optimizers apart.
"""

from __future__ import annotations

from collections.abc import Iterable

WEIGHT, TERM_WEIGHT = "balance_weight", "term_weight"
"""Prefixes: of balance weights, and of weights that differ by term only."""
DETAILS = "weights_by_layer"
"""In the alphabet, and so in TensorBoard, after ``train``, ``val`` and ``test``."""


def details_of(prefix: str) -> str:
    """The prefix of what is not a median.

    Example:
        >>> details_of("balance_weight-MTAdam-1")
        'weights_by_layer-MTAdam-1'
    """
    return DETAILS + prefix.removeprefix(WEIGHT)


def summary(prefix: str, term: str, quantile: str) -> str:
    """Of a quantile over the layers.

    Example:
        >>> summary("balance_weight", "fit", "median"), summary("balance_weight", "fit", "p10")
        ('balance_weight/fit.median', 'weights_by_layer/fit.p10')
    """
    return f"{prefix if quantile == 'median' else details_of(prefix)}/{term}.{quantile}"


def single(prefix: str, term: str, layer: str) -> str:
    """Of one layer of a term.

    Example:
        >>> single("balance_weight", "fit", "head.weight")
        'weights_by_layer.fit/head.weight'
    """
    return f"{details_of(prefix)}.{term}/{layer}"


def term_weight(term: str) -> str:
    """Of what multiplies a loss."""
    return f"{TERM_WEIGHT}/{term}"


def all_terms(prefix: str) -> str:
    """Of the picture of all terms over the steps."""
    return f"{prefix}/all_terms"


def layers_by_terms(prefix: str) -> str:
    """Of the heatmap."""
    return f"{prefix}/layers_by_terms"


def meanings_of_scalars(prefix: str, terms: Iterable[str]) -> dict[str, str]:
    """What the scalars mean, by tag, in Markdown."""
    if prefix == TERM_WEIGHT:
        return {term_weight(term): f"What the balancer multiplies the loss **{term}** by." for term in terms}
    names = {"median": "Median", "p10": "10th percentile", "p90": "90th percentile"}
    return {
        summary(prefix, term, quantile): f"{name} over the layers of the balance weight of **{term}**: the norm of its"
        " gradient over that of the anchor's. Above 1 its gradient is divided down, below 1 multiplied up."
        for term in terms
        for quantile, name in names.items()
    }


def meanings_of_pictures(prefix: str) -> dict[str, str]:
    """What the pictures mean, by tag, in Markdown."""
    over_steps = "All terms over the steps so far, on one logarithmic axis that leaves nothing out."
    if prefix == TERM_WEIGHT:
        return {all_terms(prefix): f"{over_steps} What the balancer multiplies each loss by."}
    return {
        all_terms(prefix): f"{over_steps} Of each term the median over the layers of its balance weight.",
        layers_by_terms(prefix): "The balance weight of every term at every layer that trains. Red: the term's gradient"
        " is divided down. Blue: it is multiplied up.",
    }
