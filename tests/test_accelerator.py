"""Runs the tests of ``tests/accelerator``, each file in a process of its own: see ``conftest.py`` there."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerator import device

ROOT = Path(__file__).parents[1]
QUICK = ("test_equality.py",)
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/accelerator").glob("test_*.py"))


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=[pytest.mark.slow] * (not file.endswith(QUICK))) for file in FILES]
)
def test_on_the_stand_in_accelerator(file):
    reason = device.why_not()
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", file]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-20_000:] + found.stderr[-5_000:]
    assert " passed" in found.stdout
    assert " skipped" not in found.stdout
