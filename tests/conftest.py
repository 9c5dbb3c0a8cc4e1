"""Two workers share two cores, so each test process uses one thread. Ctrl-C works where a shell turned it off, too.

The tests leave nothing behind: what appears in the project's folder while they run makes the run fail, as the next run
would find it.

Hypothesis draws the same examples in every run: few, or with ``--hypothesis-profile=thorough`` many.
"""

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("quick", derandomize=True, deadline=None, max_examples=20)
settings.register_profile(
    "thorough", settings.get_profile("quick"), max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("quick")

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for what a script starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
FOUND = pytest.StashKey[set[str]]()


def visible_entries() -> set[str]:
    """The names in the project's folder, without the hidden ones, which tools keep for themselves."""
    return {entry.name for entry in ROOT.iterdir() if not entry.name.startswith((".", "__pycache__"))}


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[FOUND] = visible_entries()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    left = sorted(visible_entries() - session.config.stash[FOUND])
    if left and not hasattr(session.config, "workerinput"):
        session.config.get_terminal_writer().line(f"\nThe tests left {', '.join(left)} in {ROOT}.", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
