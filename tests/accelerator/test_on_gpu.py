"""The command for a machine with a GPU runs, and a failed check fails it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.stand_in
SECTIONS = {"waits", "kernels", "memory", "step", "whole step", "modes", "equality"}


def run(folder, *more, code=""):
    command = "import runpy, sys; sys.argv = ['on_gpu', *sys.argv[1:]];" + code
    command += "runpy.run_module('tests.accelerator.on_gpu', run_name='__main__')"
    arguments = ["--device", "accel", "--quick", "--json", str(folder / "table.json"), *more]
    found = subprocess.run([sys.executable, "-c", command, *arguments], cwd=ROOT, capture_output=True, text=True)
    return found, json.loads((folder / "table.json").read_text())["rows"]


def test_it_runs_every_section_and_says_what_it_found(tmp_path):
    found, rows = run(tmp_path)
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-5000:]
    assert {row["section"] for row in rows} >= SECTIONS
    assert all(row["passed"] is not False for row in rows)
    assert sum(row["passed"] is True for row in rows) > 15
    assert "stand-in accelerator" in found.stdout


def test_a_check_that_fails_fails_the_command(tmp_path):
    spoil = (
        "import os; os.environ['LIGHTNING_MTADAM_DEVICE'] = 'accel';"
        "from tests.accelerator import measures, modes, timing;"
        "measures.OPTIONS = ({'anchor': 'nobody'},);"
        "measures.kernels = measures.memory = modes.modes = timing.steps = timing.whole_steps = lambda *_: ();"
    )
    found, rows = run(tmp_path, code=spoil)
    assert found.returncode == 1
    (failed,) = [row for row in rows if row["passed"] is False]
    assert "nobody" in failed["found"]
