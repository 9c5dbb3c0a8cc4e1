"""Folders that are written to: a full disk and a file in the way are called by their names."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Say where there is no room, and how to go on.

    Raises:
        OSError: in place of the one that writing raised.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"There is no room to write to {folder} ({error.strerror}). The last checkpoint there is whole: free some"
            " space and give the same command with --resume",
        ) from error


def make_folder(folder: Path) -> None:
    """Make the folder and those that it is in, unless they are there.

    Raises:
        FileExistsError: a file is in the way.
    """
    check_way(folder)
    folder.mkdir(parents=True, exist_ok=True)


def check_way(folder: Path) -> None:
    """Raise if there is a file where a folder, or one that it is in, should be.

    Raises:
        FileExistsError: naming the file.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise FileExistsError(f"{place} is a file, and no folder can be there. Give another --output-dir.")
