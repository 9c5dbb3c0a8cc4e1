"""What a row of the matrix is, and how rows come into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HAND_LOOP = "equals the hand-written loop"
ADAM = "behaves as with Adam"
REFUSED = "refused with an error"

ROWS: list[Row] = []
Check = Callable[..., None]


@dataclass(frozen=True)
class Row:
    """One thing that a user may ask of the Trainer.

    Attributes:
        group: the line of the support table.
        feature: the words in that line, in Markdown; several rows may test one feature.
        result: what comes of it: HAND_LOOP, ADAM or REFUSED.
        check: ``check(folder, *case)`` fails unless that is so.
        case: the arguments of this row.
        ignored: the beginnings of warnings that are expected.
    """

    group: str
    feature: str
    result: str
    check: Check
    case: tuple[Any, ...] = ()
    ignored: tuple[str, ...] = ()

    def __call__(self, folder: Path) -> None:
        """Fail unless the row's result is true."""
        self.check(folder, *self.case)

    @property
    def name(self) -> str:
        """For the test's id."""
        return "-".join([self.check.__name__, *(getattr(part, "__name__", str(part)) for part in self.case)])


def row(
    group: str, feature: str, result: str, *, cases: Iterable[Any] = ((),), ignored: Iterable[str] = ()
) -> Callable[[Check], Check]:
    """Put a check into the matrix: a row for each case, which is a tuple of arguments, or a single one."""

    def register(check: Check) -> Check:
        for case in cases:
            arguments = case if isinstance(case, tuple) else (case,)
            ROWS.append(Row(group, feature, result, check, arguments, tuple(ignored)))
        return check

    return register
