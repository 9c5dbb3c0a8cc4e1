"""What a gradient report says, by names: of the network, and of each of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from lightning_mtadam.gradient_statistics import GradientStatistics, conflicts, dead, drowned

MAX_PAIRS = 15
"""With more pairs of terms than this only the smallest cosine of each term is a scalar; the picture has all."""


@dataclass(frozen=True)
class GradientSummary:
    """What the gradients of the terms were like in one step; of the network, or of one layer.

    Attributes:
        step: of the optimizer, as the callback counts them from 0.
        terms: their names, in order.
        norms: the L2 norm of each term's gradient, without weights or scales.
        update_norm: the L2 norm of the update: of the gradient that the optimizer steps on, before clipping.
        shares: the share of each term in the update; they add up to one. nan where the update is zero.
        cosines: by two terms the cosine between their gradients; nan where one of them is zero.
        cosines_to_update: the cosine between each term's gradient and the update.
        alignment: from -1, where the gradients cancel, to 1, where all point the same way.
        dead: the terms without a gradient.
        drowned: the terms with a gradient, but a share below 1 % in magnitude.
        conflicts: two terms and their cosine, where that is below -0.05; the worst first.
        layers: the same by layer; empty in those.
    """

    step: int
    terms: tuple[str, ...]
    norms: dict[str, float]
    update_norm: float
    shares: dict[str, float]
    cosines: dict[str, dict[str, float]]
    cosines_to_update: dict[str, float]
    alignment: float
    dead: tuple[str, ...]
    drowned: tuple[str, ...]
    conflicts: tuple[tuple[str, str, float], ...]
    layers: Mapping[str, GradientSummary] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, found: GradientStatistics, terms: Sequence[str], step: int, layers: Mapping[str, GradientSummary]
    ) -> GradientSummary:
        """Name what was found."""
        rows = [dict(zip(terms, row, strict=True)) for row in found.cosines.tolist()]
        return cls(
            step=step,
            terms=tuple(terms),
            norms=dict(zip(terms, found.norms.tolist(), strict=True)),
            update_norm=float(found.update_norm),
            shares=dict(zip(terms, found.shares.tolist(), strict=True)),
            cosines=dict(zip(terms, rows, strict=True)),
            cosines_to_update=dict(zip(terms, found.cosines_to_update.tolist(), strict=True)),
            alignment=float(found.alignment),
            dead=dead(found, terms),
            drowned=drowned(found, terms),
            conflicts=conflicts(found, terms),
            layers=layers,
        )

    @classmethod
    def of_layers(
        cls, found: GradientStatistics, terms: Sequence[str], step: int, layers: Sequence[str]
    ) -> GradientSummary:
        """Name what was found at L layers, and of the network."""
        each = zip(layers, found.gram, found.parts, strict=True)
        parts = {name: cls.of(GradientStatistics(gram, part), terms, step, {}) for name, gram, part in each}
        return cls.of(found.whole, terms, step, parts)

    def scalars(self, suffix: str = "") -> dict[str, float]:
        """What loggers get of the network, by tag; what is nan is left out. ``suffix``: of the tags' first part."""
        norm, share, cosine = (f"gradient_{name}{suffix}" for name in ("norm", "share", "cosine"))
        pairs = list(combinations(self.terms, 2))
        found = {f"{norm}/{term}": value for term, value in self.norms.items()}
        found |= {f"{share}/{term}": value for term, value in self.shares.items()}
        found |= {f"{cosine}/{term}.update": value for term, value in self.cosines_to_update.items()}
        if len(pairs) <= MAX_PAIRS:
            found |= {f"{cosine}/{one}.{other}": self.cosines[one][other] for one, other in pairs}
        else:
            found |= {f"{cosine}/{term}.smallest": self._smallest(term) for term in self.terms}
        found[f"gradient_alignment{suffix}"] = self.alignment
        for name in ("dead", "drowned", "conflicts"):
            found[f"gradient_terms{suffix}/{name}"] = float(len(getattr(self, name)))
        return {tag: value for tag, value in found.items() if not math.isnan(value)}

    def __str__(self) -> str:
        """A line for each term, and what is wrong."""
        width = max(map(len, self.terms))
        lines = [
            f"{term:{width}}  norm {self.norms[term]:8.2e}  share {100 * self.shares[term]:6.1f} %"
            f"  cosine to the update {self.cosines_to_update[term]:5.2f}"
            for term in self.terms
        ]
        lines.append(f"alignment {self.alignment:.2f}")
        lines += [f"dead: {term}" for term in self.dead]
        lines += [f"drowned: {term}" for term in self.drowned]
        lines += [f"in conflict: {one} and {other}, cosine {cosine:.2f}" for one, other, cosine in self.conflicts]
        return f"step {self.step}\n" + "\n".join(lines)

    def _smallest(self, term: str) -> float:
        others = [cosine for other, cosine in self.cosines[term].items() if other != term and not math.isnan(cosine)]
        return min(others, default=math.nan)
