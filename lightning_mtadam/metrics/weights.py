"""Where the weights of the feature networks come from: files, never quietly something else."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_mtadam.metrics.extra import require

INCEPTION_VARIABLE = "LIGHTNING_MTADAM_INCEPTION_WEIGHTS"


def inception_file(weights_path: str | Path | None) -> Path:
    """The file of pytorch-fid's Inception weights.

    It is the path given, or else that in the environment variable ``LIGHTNING_MTADAM_INCEPTION_WEIGHTS``, or else the
    one that pytorch-fid itself uses, in the cache of ``torch.hub``, where it is downloaded to if it is missing.

    Raises:
        FileNotFoundError: there is no such file, or it could not be downloaded.
    """
    url = str(require("pytorch_fid.inception").FID_WEIGHTS_URL)
    remedies = (
        f" Download {url} where there is a network, and give it as weights_path=... or in the environment variable"
        f" {INCEPTION_VARIABLE}, or put it at {_cached(url)}. A distance that needs no download, which is not FID, is"
        " that of FrechetVGG16Distance."
    )
    for source, path in (("weights_path", weights_path), (INCEPTION_VARIABLE, os.environ.get(INCEPTION_VARIABLE))):
        if path:
            return _existing(Path(path), source, remedies)
    if not _cached(url).exists():
        _download(url, remedies)
    return _cached(url)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by name, without running any code that the file may hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    path = _existing(Path(path), "weights_path", " Give the path of a file of weights.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[:1]
        raise ValueError(f"{path} cannot be read as a file of weights ({reason}). Download it again.") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} must hold the tensors of a network by name, but holds something else.")
    return dict(found)


def _cached(url: str) -> Path:
    """Where torch.hub, and so pytorch-fid, keeps what it has downloaded from a URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _existing(path: Path, source: str, remedies: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{source} is {str(path)!r}, but there is no such file.{remedies}")
    return path


def _download(url: str, remedies: str) -> None:
    """Fetch a file whose name ends in "-<the beginning of its SHA-256>.pth", as those of torch.hub do."""
    target = _cached(url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=target.stem.rpartition("-")[2])
    except (OSError, RuntimeError) as error:  # no network; another hash
        raise FileNotFoundError(
            f"The Inception weights that define FID are not here, and could not be downloaded ({error}).{remedies}"
        ) from error
