"""MNIST from a folder, from the net, or the subset that ships with the project."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from urllib.error import URLError

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

from example_projects.common.exact_resume import EpochSampler
from example_projects.mnist.module import CLASSES

MEAN, DEVIATION = 0.1307, 0.3081
PIXELS = (28, 28)
SUBSET = Path(__file__).parent / "subset"
DOWNLOADED = Path("data")
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(path: Path) -> Tensor:
    """Read an idx file of bytes, gzipped or not.

    Raises:
        ValueError: the file is no idx file of bytes, or is cut short.
    """
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}). Download it again.") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes. Download it again.")
    dimensions = content[3]
    if len(content) < 4 + 4 * dimensions:
        raise ValueError(f"{path} is cut short in its header. Download it again.")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} has {values.size} bytes of data, but its header says {shape}. Download it again.")
    return torch.from_numpy(values.reshape(shape).copy())


def read_split(folder: Path, split: str) -> TensorDataset:
    """Read "train" or "test" from the four idx files in ``folder`` or in ``folder/MNIST/raw``.

    Raises:
        FileNotFoundError: a file is in neither place.
        ValueError: a file is damaged, or they are not the images and the labels of one split.
    """
    paths = [find_file(folder, name) for name in FILES[split]]
    images, labels = map(read_idx, paths)
    fault = fault_of(images, labels, *paths)
    if fault:
        names = " and ".join(FILES[split])
        raise ValueError(f"{fault} Put MNIST's own {names} there, or leave out --data-dir to download them.")
    normalised = (images.float().div(255)[:, None] - MEAN) / DEVIATION
    return TensorDataset(normalised, labels.long())


def fault_of(images: Tensor, labels: Tensor, image_file: Path, label_file: Path) -> str:
    """Why they cannot be the images and the labels of a split of MNIST; empty, if they can.

    Args:
        images: should be [N, 28, 28].
        labels: should be [N], from 0 to 9.
        image_file: that the images were read from.
        label_file: that the labels were read from.
    """
    if images.shape[1:] != PIXELS:
        return f"{image_file} has the shape {tuple(images.shape)}, but images have (N, {PIXELS[0]}, {PIXELS[1]})."
    if labels.dim() != 1:
        return f"{label_file} has the shape {tuple(labels.shape)}, but labels have (N,)."
    if len(images) != len(labels):
        return f"{label_file} has {len(labels)} labels, but {image_file} has {len(images)} images."
    if not len(images):
        return f"{image_file} has no images."
    if labels.max() >= CLASSES:
        return f"{label_file} has the label {labels.max()}, but labels are from 0 to {CLASSES - 1}."
    return ""


def find_file(folder: Path, name: str) -> Path:
    """Where the file is, gzipped or not, in ``folder`` or in ``folder/MNIST/raw``."""
    places = [place / (name + suffix) for place in (folder, folder / "MNIST" / "raw") for suffix in ("", ".gz")]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"{name} (or {name}.gz) is neither in {folder} nor in {folder / 'MNIST' / 'raw'}. Give --data-dir the folder"
        " with MNIST's four idx files, or leave it out to download them."
    )


def find_data(data_dir: Path | None) -> tuple[Path, str]:
    """Where MNIST is, and a sentence that says so: the given folder, a download, or the shipped subset."""
    if data_dir is not None:
        return data_dir, f"MNIST from {data_dir}."
    try:
        MNIST(str(DOWNLOADED), download=True)
    except (URLError, RuntimeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return SUBSET, (
            f"MNIST could not be downloaded ({reason}). Using the subset of real MNIST that ships with the project:"
            " 10,000 training and 2,000 test images. Give --data-dir for the full set."
        )
    return DOWNLOADED, f"MNIST, downloaded to {DOWNLOADED.resolve()}."


class MNISTData(pl.LightningDataModule):
    """MNIST in batches, in an order that depends on the seed alone.

    Args:
        folder: with the four idx files.
        batch_size: of training.
        seed: of the order.
    """

    def __init__(self, folder: Path, batch_size: int, seed: int) -> None:
        super().__init__()
        self.folder, self.batch_size, self.seed = folder, batch_size, seed

    def setup(self, stage: str) -> None:
        """Read the files, once."""
        if not hasattr(self, "train"):
            self.train, self.test = read_split(self.folder, "train"), read_split(self.folder, "test")

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Training batches."""
        sampler = EpochSampler(len(self.train), self.batch_size, self.seed, self.trainer)
        # A generator of its own, so that making an iterator takes no random numbers from the training.
        return DataLoader(self.train, self.batch_size, sampler=sampler, generator=torch.Generator())

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Test batches; of several processes each takes its share, and the metrics count over all."""
        share = range(self.trainer.global_rank, len(self.test), self.trainer.world_size)
        return DataLoader(self.test, 1000, sampler=share)
