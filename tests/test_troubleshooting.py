"""The page on messages quotes what the package says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
FIXED = 25
"""Characters that a text of the source must have beside what it fills in, to count as a message."""


def quoted(text):
    """The messages on the page, each in one line, without the name of the error."""
    blocks = re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [" ".join(block.split()).partition(": ")[2] for block in blocks]


def parts(node):
    """The fixed parts of a text in the source; None for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part for value in node.values for part in parts(value)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return parts(node.left) + parts(node.right)
    return [None]


def texts():
    """Every text of the package with enough fixed parts, as a pattern."""
    for path in (ROOT / "lightning_mtadam").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = parts(node) if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)) else []
            if sum(len(part) for part in found if part) >= FIXED:
                yield re.compile("".join(".*" if part is None else re.escape(part) for part in found), re.DOTALL)


PATTERNS = [*texts()]
MESSAGES = quoted(PAGE.read_text())


def is_said(message):
    return any(pattern.fullmatch(message) for pattern in PATTERNS)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:50])
def test_a_quoted_message_is_one_of_the_package(message):
    assert is_said(message)


def test_a_message_that_was_changed_would_be_found():
    assert len(MESSAGES) >= 25
    assert not any(is_said(message.replace("e", "i")) for message in MESSAGES)


def test_each_message_has_a_reason_and_a_remedy():
    entries = PAGE.read_text().split("\n### ")[1:]
    assert len(entries) == len(MESSAGES)
    assert all("**Why**" in entry and "**Do**" in entry for entry in entries)
    assert f"These are the {len(entries)} messages" in PAGE.read_text()
