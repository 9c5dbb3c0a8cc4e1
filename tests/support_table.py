"""The support table, made from the rows of the matrix: ``python -m tests.support_table`` writes it to its page."""

from __future__ import annotations

from pathlib import Path

import tests.trainer_matrix  # noqa: F401  (fills ROWS)
from tests.trainer_matrix.table import REFUSED, ROWS

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
BEGIN = "<!-- support table: python -m tests.support_table -->\n"
END = "<!-- end of support table -->\n"
ON_AN_ACCELERATOR = {
    "Gradients": "stand-in",
    "Checkpoints": "stand-in: resumed from the other device",
    "Precision": "stand-in: 64-true, bf16-true, bf16-mixed",
}
"""What ran where, by group: what ``tests/accelerator/test_lightning.py`` runs. All else ran nowhere but on the CPU."""


def support_table() -> str:
    """A line of Markdown for each group and result, what is refused last."""
    features: dict[tuple[str, str], dict[str, None]] = {}
    for row in sorted(ROWS, key=lambda row: row.result == REFUSED):
        features.setdefault((row.group, row.result), {})[row.feature] = None
    lines = [
        f"| {group} | {'; '.join(words)} | {result} | {ON_AN_ACCELERATOR.get(group, 'not run')} |"
        for (group, result), words in features.items()
    ]
    return "\n".join(["| | what | on the CPU | on an accelerator |", "|---|---|---|---|", *lines, ""])


def with_table(text: str) -> str:
    """The text with today's table between the two markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"There must be a line {BEGIN!r} and after it a line {END!r}.")
    return f"{before}{BEGIN}{support_table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
