"""MNIST is read from its files, found, and refused where it is damaged."""

import gzip
import itertools
from urllib.error import URLError

import pytest
import torch

from example_projects.mnist import data as mnist_data
from example_projects.mnist.data import FILES, SUBSET, find_data, read_idx, read_split
from example_projects.mnist.make_subset import choose, write_idx
from example_projects.mnist.module import CLASSES
from tests.examples.mnist.tiny import BATCH, EPOCH
from tests.examples.running import digest


def test_a_plain_and_a_gzipped_file_read_the_same(tmp_path):
    values = torch.randint(256, (3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_idx(tmp_path / "packed.gz", values)
    (tmp_path / "plain").write_bytes(gzip.decompress((tmp_path / "packed.gz").read_bytes()))
    assert (tmp_path / "plain").read_bytes()[:16] == bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5])
    for name in ("plain", "packed.gz"):
        assert read_idx(tmp_path / name).dtype == torch.uint8
        assert torch.equal(read_idx(tmp_path / name), values)


@pytest.mark.parametrize("kept", [0, 2, 3, 4, 10, 15, 16, 19])
def test_a_file_cut_anywhere_raises_and_names_the_file(tmp_path, kept):
    path = tmp_path / "train-labels-idx1-ubyte"
    whole = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2]) + bytes(4)
    path.write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.*Download it again"):
        read_idx(path)


def test_a_file_that_is_too_long_raises_and_names_the_file(tmp_path):
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes(3))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte has 3 bytes of data.*\(2,\)"):
        read_idx(path)


@pytest.mark.parametrize("magic", [b"\x00\x00\x0d\x01", b"\x01\x00\x08\x01", b"<htm"])
def test_a_wrong_magic_number_raises_and_names_the_file(tmp_path, magic):
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(magic + bytes([0, 0, 0, 2, 0, 0]))
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is not an idx file of unsigned bytes"):
        read_idx(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: b"<html>not found</html>",
        lambda packed: b"",
        lambda packed: packed[:-9],
        lambda packed: packed[:5],
        lambda packed: packed[:-8] + bytes(4) + packed[-4:],
        lambda packed: packed[:10] + bytes([0xFF] * 8) + packed[18:],
    ],
    ids=["no gzip", "empty", "cut short", "cut in the header", "wrong checksum", "broken stream"],
)
def test_a_damaged_gzip_file_raises_and_names_the_file(tmp_path, damage):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, torch.arange(200, dtype=torch.uint8).view(2, 10, 10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not"):
        read_idx(path)


@pytest.mark.parametrize("inside", ["", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_split_is_found_in_the_folder_or_where_torchvision_puts_it(tiny, tmp_path, inside, packed):
    place = tmp_path / inside
    place.mkdir(parents=True, exist_ok=True)
    for name in itertools.chain(*FILES.values()):
        content = (tiny / f"{name}.gz").read_bytes()
        (place / (f"{name}.gz" if packed else name)).write_bytes(content if packed else gzip.decompress(content))
    for split, size in (("train", BATCH * EPOCH), ("test", 20)):
        images, labels = read_split(tmp_path, split).tensors
        raw = read_idx(tiny / f"{FILES[split][0]}.gz")
        assert images.shape == (size, 1, 28, 28)
        torch.testing.assert_close(images[:, 0], (raw / 255 - 0.1307) / 0.3081)
        assert labels.dtype == torch.int64
        assert labels.tolist() == [index % CLASSES for index in range(size)]


@pytest.mark.parametrize("name", [name for names in FILES.values() for name in names])
def test_a_missing_file_raises_and_says_which_and_what_to_do(tiny, tmp_path, name):
    for path in tiny.iterdir():
        if path.stem != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    split = next(split for split, names in FILES.items() if name in names)
    with pytest.raises(FileNotFoundError, match=rf"^{name} .*or {name}\.gz.*Give --data-dir") as raised:
        read_split(tmp_path, split)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        ((4,), [0] * 4, r"train-images-idx3-ubyte\.gz has the shape \(4,\), but images have \(N, 28, 28\)"),
        ((4, 32, 32), [0] * 4, r"train-images-idx3-ubyte\.gz has the shape \(4, 32, 32\)"),
        ((1, 28, 28), [[0] * 4], r"train-labels-idx1-ubyte\.gz has the shape \(1, 4\), but labels have \(N,\)"),
        ((6, 28, 28), [0] * 4, r"train-labels-idx1-ubyte\.gz has 4 labels, but .*images-idx3-ubyte\.gz has 6 images"),
        ((0, 28, 28), [], r"train-images-idx3-ubyte\.gz has no images"),
        ((2, 28, 28), [9, 255], r"train-labels-idx1-ubyte\.gz has the label 255, but labels are from 0 to 9"),
        ((2, 28, 28), [9, 10], r"train-labels-idx1-ubyte\.gz has the label 10"),
    ],
    ids=["labels as images", "size", "images as labels", "counts", "empty", "255", "10"],
)
def test_files_that_are_no_split_of_mnist_are_refused_by_name_with_what_to_do(tmp_path, images, labels, said):
    write_idx(tmp_path / f"{FILES['train'][0]}.gz", torch.zeros(images, dtype=torch.uint8))
    write_idx(tmp_path / f"{FILES['train'][1]}.gz", torch.tensor(labels, dtype=torch.uint8))
    remedy = r".* Put MNIST's own train-images-idx3-ubyte and train-labels-idx1-ubyte there, or leave out --data-dir"
    with pytest.raises(ValueError, match=said + remedy):
        read_split(tmp_path, "train")


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_the_shipped_subset_is_stratified(split, per_class):
    images, labels = read_split(SUBSET, split).tensors
    assert images.shape == (CLASSES * per_class, 1, 28, 28)
    assert labels.bincount().tolist() == [per_class] * CLASSES
    assert images.flatten(1).std(1).min() > 0, "an image is empty"
    assert len({digest([image]) for image in images}) > 0.99 * len(images), "images are repeated"


def test_a_subset_keeps_the_first_of_every_class_in_order():
    labels = torch.tensor([1, 0, 1, 1, 0, 2, 0, 2, 2])
    assert choose(labels, 2).tolist() == [0, 1, 2, 4, 5, 7]


def test_the_same_values_give_the_same_file(tmp_path):
    for name in ("one.gz", "two.gz"):
        write_idx(tmp_path / name, torch.arange(9, dtype=torch.uint8))
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), RuntimeError("Error downloading\nfrom all mirrors"), TimeoutError()]
)
def test_offline_the_shipped_subset_is_used_and_it_says_so(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(mnist_data, "MNIST", download)
    folder, said = find_data(None)
    assert folder == SUBSET
    assert "could not be downloaded" in said
    assert "subset" in said
    assert "10,000 training and 2,000 test" in said
    assert "--data-dir" in said
    assert "\n" not in said


def test_a_given_folder_is_used_without_a_download(monkeypatch, tmp_path):
    def download(*args, **kwargs):
        raise AssertionError("downloads though a folder is given")

    monkeypatch.setattr(mnist_data, "MNIST", download)
    folder, said = find_data(tmp_path)
    assert folder == tmp_path
    assert str(tmp_path) in said
