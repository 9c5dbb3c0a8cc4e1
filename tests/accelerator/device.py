"""The stand-in accelerator: ``register()`` makes the device ``accel`` known, ``Watch`` counts what it does."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

NAME = "accel"
SOURCE = Path(__file__).with_name("standin.cpp")
KINDS = ("item", "d2h", "h2d", "kernel", "event", "stream", "device")
"""The ways in which the host can wait."""


def why_not() -> str | None:
    """What is missing to build it; ``None`` if nothing is."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA, whose list of kernels the stand-in accelerator follows"
    if shutil.which("g++") is None or shutil.which("ninja", path=_path()) is None:
        return "the stand-in accelerator needs g++, and ninja: pip install ninja"
    if torch.__version__ < "2.11":
        return "the stand-in accelerator is written for torch 2.11 and later"
    return None


def _path() -> str:
    """Where programs are, those beside this Python too: it may run without its environment being activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


class _Module:
    """What ``torch.accel`` is: those functions of ``torch.cuda`` that others ask for."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    _is_in_bad_fork = staticmethod(lambda: False)
    _lazy_init = staticmethod(lambda: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    memory_stats = staticmethod(lambda device=None: {})
    empty_cache = staticmethod(lambda: None)
    manual_seed = staticmethod(lambda seed: torch.default_generator.manual_seed(seed))
    manual_seed_all = staticmethod(lambda seed: torch.default_generator.manual_seed(seed))
    get_rng_state = staticmethod(lambda device=NAME: torch.default_generator.get_state())
    set_rng_state = staticmethod(lambda state, device=NAME: torch.default_generator.set_state(state))

    @staticmethod
    def current_device() -> int:
        return native().current_device()

    @staticmethod
    def set_device(device: Any) -> None:
        native().set_device(device if isinstance(device, int) else torch.device(device).index or 0)

    @staticmethod
    def synchronize(device: Any = None) -> None:
        native().synchronize(_Module.current_device() if device is None else torch.device(device).index or 0)

    @staticmethod
    @contextmanager
    def device(device: Any) -> Any:
        before = _Module.current_device()
        _Module.set_device(device)
        try:
            yield
        finally:
            _Module.set_device(before)


@cache
def native() -> Any:
    """The compiled part; compiled once for each torch, into torch's cache of extensions."""
    from torch.utils.cpp_extension import load

    os.environ.update(PATH=_path(), MAX_JOBS="1")
    name = "standin_" + "".join(letter if letter.isalnum() else "_" for letter in torch.__version__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers and of CUDA, which nothing here needs
        return load(name, [str(SOURCE)], extra_cflags=["-O0", "-w"], verbose=False)


@cache
def register() -> None:
    """Make the device known to torch; for the rest of the process."""
    native()
    torch.utils.rename_privateuse1_backend(NAME)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    torch._register_device_module(NAME, _Module)
    native().watch(_note)


_watching: list[Watch] = []


def _note(kind: str, name: str) -> None:
    for watch in _watching:
        watch.note(kind, name)


class Watch:
    """Counts kernels and views, and where the host waits, while it is entered.

    Args:
        forbid: those of ``KINDS`` that raise.
    """

    def __init__(self, *forbid: str) -> None:
        self.forbid = set(forbid)
        self.waits: Counter[tuple[str, str, str]] = Counter()  # kind, operation, line of this package
        self.kernels: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.peak = 0  # bytes held at most, above what was held when it was entered

    def note(self, kind: str, name: str) -> None:
        """Called whenever the host waits."""
        frames = [frame for frame in traceback.extract_stack() if "lightning_mtadam/" in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
        self.waits[kind, name, where] += 1
        if kind in self.forbid:
            raise AssertionError(f"{kind} {name} makes the host wait at {where}")

    def __enter__(self) -> Watch:
        native().reset()
        self._held = native().memory()[0]
        _watching.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _watching.remove(self)
        kernels, views = native().counts()
        self.kernels, self.views = Counter(kernels), Counter(views)
        self.peak = native().memory()[1] - self._held

    @property
    def launches(self) -> int:
        """The number of kernels."""
        return sum(self.kernels.values())
