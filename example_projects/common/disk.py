"""A full disk is called by its name."""

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
