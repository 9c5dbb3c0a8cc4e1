"""An anchor that changes in the course of training."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class AnchorSchedule:
    """One anchor at first, another one later.

    Attributes:
        early: MTAdam's anchor at first, a term's name or a policy.
        late: its anchor afterwards.
        share: of the steps, after which it changes; at 1 it never does.
    """

    early: str | None
    late: str | None
    share: float

    def change_at(self, steps: int) -> int:
        """The step before which the anchor changes."""
        return round(self.share * steps)


def read_anchor(text: str | None) -> AnchorSchedule:
    """Read an anchor, or two of them and when one follows the other.

    Raises:
        ValueError: the share is not between 0 and 1.

    Example:
        >>> read_anchor("max-mean@0.5")
        AnchorSchedule(early='max', late='mean', share=0.5)
        >>> read_anchor("mean")
        AnchorSchedule(early='mean', late='mean', share=1.0)
    """
    found = re.fullmatch(r"(\w+)-(\w+)@([\d.]+)", text or "")
    if found is None:
        return AnchorSchedule(text, text, 1.0)
    early, late, share = found.groups()
    if not 0 < float(share) < 1:
        raise ValueError(f"An anchor changes at a share of the steps between 0 and 1, but got {text!r}.")
    return AnchorSchedule(early, late, float(share))
