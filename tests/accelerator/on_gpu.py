"""All that is to be seen on a GPU, in one command: ``python -m tests.accelerator.on_gpu``.

It needs torch, lightning, numpy and pytest, no network, and at most eight minutes. It prints a table, writes it as
JSON, and exits with 1 if a check fails. ``--device accel --quick`` runs what needs no CUDA on the stand-in accelerator.

- equality: the tests of ``tests/accelerator``, which compare trainings with the host's in float64 and in fp32;
- waits: steady steps in which the host may wait for nothing;
- kernels and memory of a step;
- step: the time of ``MTAdam.step`` over I times a step of ``torch.optim.Adam(fused=True)``;
- whole step: forward, backward and step of ResNet-18, over the same with Adam on the sum of the losses;
- modes: runs that repeat, channels_last, bf16, fp16 with a gradient scaler, compile, CUDA graphs, two ranks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.accelerator.measures import Row

HERE = Path(__file__).parent


def options() -> argparse.Namespace:
    """Those of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or accel: the stand-in of the tests")
    parser.add_argument("--quick", action="store_true", help="a few cases of each section: to see that it runs")
    parser.add_argument("--json", type=Path, default=Path("on_gpu.json"), help="where the table is written")
    found = parser.parse_args()
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here. Give --device accel to run on the stand-in accelerator.")
    return found


def equality(device: str, quick: bool) -> Iterator[Row]:
    """The tests, by file."""
    import pytest

    from tests.accelerator.measures import Row

    counted: dict[str, list[str]] = {}

    class Notes:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.failed:
                passed, *failed = counted.setdefault(report.fspath, ["0"])
                counted[report.fspath] = [str(int(passed) + report.passed), *failed]
                if report.failed:
                    counted[report.fspath].append(report.nodeid.partition("::")[2])

    files = [str(HERE / f"test_{name}.py") for name in ("equality", "faults", "balancers", "lightning")]
    chosen = ["-k", "default or fixed or partitioned"] if quick else []
    settings = ["-c", os.devnull, "--rootdir", str(HERE.parents[1]), "-p", "no:cacheprovider", "-q", "--no-header"]
    pytest.main([*settings, "--tb=line", *chosen, *files], plugins=[Notes()])
    for file, (passed, *failed) in counted.items():
        said = f"{passed} passed, {len(failed)} failed{': ' if failed else ''}{'; '.join(failed[:5])}"
        yield Row("equality", Path(file).name, said, not failed)


def run(section: Callable[[str, bool], Iterator[Row]], device: str, quick: bool) -> Iterator[Row]:
    """The rows of a section; an error in it is one more."""
    from tests.accelerator.measures import Row

    begin = time.perf_counter()
    try:
        yield from section(device, quick)
    except Exception as error:
        traceback.print_exc()
        yield Row(section.__name__, "error", f"{type(error).__name__}: {error}".splitlines()[0], False)
    yield Row(section.__name__, "seconds", f"{time.perf_counter() - begin:.0f}")


def main() -> None:
    """Run every section, print the table, write it, and say by the exit status whether all is well."""
    given = options()
    os.environ["LIGHTNING_MTADAM_DEVICE"] = given.device  # what the tests run on
    warnings.simplefilter("ignore")
    if given.device == "accel":
        from tests.accelerator.device import register

        register()
        name = "stand-in accelerator"
    else:
        name = torch.cuda.get_device_name()
    from tests.accelerator.measures import kernels, memory, waits
    from tests.accelerator.modes import modes
    from tests.accelerator.timing import steps, whole_steps

    rows: list[Row] = []
    head = {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "versions": {one: version(one) for one in ("torch", "lightning")} | {"python": platform.python_version()},
    }
    print(f"{name}, {head['date']}, {head['versions']}\n\n| section | case | found | |\n| --- | --- | --- | --- |")
    for section in (waits, kernels, memory, steps, whole_steps, modes, equality):
        short = given.quick or (given.device == "accel" and section in (steps, whole_steps, modes))  # it is no faster
        for row in run(section, given.device, short):
            rows.append(row)
            verdict = {None: "", True: "ok", False: "FAILED"}[row.passed]
            print(f"| {row.section} | {row.case} | {row.found} | {verdict} |", flush=True)
        given.json.write_text(json.dumps({**head, "rows": [row._asdict() for row in rows]}, indent=1))
    failed = [row for row in rows if row.passed is False]
    print(f"\n{len(rows)} rows, {len(failed)} failed; written to {given.json}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
