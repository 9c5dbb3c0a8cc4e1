"""FID and FD-VGG16 on their own networks with random weights, and the files that these come from.

With random weights no distance is FID, whatever it is called here: what is compared is how it is computed.
"""

import importlib
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid import fid_score
from scipy import linalg
from torch.nn import functional as F

from lightning_mtadam.metrics import FrechetInceptionDistance, FrechetVGG16Distance
from lightning_mtadam.metrics.features import InceptionFeatures, VGG16Features
from lightning_mtadam.metrics.weights import INCEPTION_VARIABLE, inception_file, read_weights
from tests.metrics.random_weights import CONVOLUTIONS

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
COUNT = 3


def random_images(seed, size=(40, 36)):
    """Coloured clouds, [COUNT, 3, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    clouds = torch.rand(COUNT, 3, 4, 4, generator=generator) * torch.rand(COUNT, 3, 1, 1, generator=generator)
    return F.interpolate(clouds, size, mode="bilinear")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub, no variable, and no network."""
    downloads = []

    def download(url, target, hash_prefix=None, progress=True):
        downloads.append((url, target, hash_prefix))
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub_home"))
    monkeypatch.delenv(INCEPTION_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return tmp_path / "hub_home" / "hub" / "checkpoints", downloads


# FID


def root_of_low_rank(product, disp):
    """The root of [D, D] of the rank COUNT - 1, computed within its range, and what the command ignores."""
    basis = np.linalg.qr(product @ np.random.default_rng(0).normal(size=(len(product), COUNT - 1)))[0]
    return basis @ linalg.sqrtm(basis.T @ product @ basis) @ basis.T, None


@pytest.fixture
def run_command(hub, random_inception, monkeypatch, capsys):
    """Calls ``python -m pytorch_fid`` with two folders of COUNT images each, and returns what it prints.

    Its root of a singular matrix is replaced: it takes half a minute, is off by some 1e-6, and fails with SciPy from
    1.18 on.
    """
    hub[0].mkdir(parents=True)
    (hub[0] / FILE).symlink_to(random_inception)
    monkeypatch.setattr(fid_score, "linalg", SimpleNamespace(sqrtm=root_of_low_rank))

    def run(*folders):
        arguments = [*map(str, folders), "--num-workers", "0", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["pytorch_fid", *arguments])
        runpy.run_module("pytorch_fid", run_name="__main__")
        return float(capsys.readouterr().out.rpartition("FID: ")[2])

    return run


def test_fid_equals_the_command_of_pytorch_fid_on_the_same_images_as_png(random_inception, run_command, tmp_path):
    sets = {"real": random_images(0), "made": random_images(1)}
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for index, image in enumerate(images):
            pixels = image.mul(255).add(0.5).to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    fid = FrechetInceptionDistance(random_inception)
    fid.train()
    for name, images in sets.items():
        fid.update(images, real=name == "real")
    expected = run_command(tmp_path / "real", tmp_path / "made")
    assert expected > 1
    assert fid.compute().item() == pytest.approx(expected, abs=1e-6)
    assert (fid.label, fid.n) == ("FID", COUNT)


def test_inception_features_are_of_resized_images_and_in_double_precision(random_inception):
    features = InceptionFeatures(random_inception)
    images = random_images(0)[:1]
    larger = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
    found = features(images)
    assert (found.shape, found.dtype) == ((1, 2048), torch.float64)
    torch.testing.assert_close(features(larger), found)
    assert not list(features.parameters())
    assert not features.state_dict()


# FD-VGG16


def vgg16_by_hand(images, weights):
    """The mean over all places of the 13th convolution's activations, [B, 512]."""
    x = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for position, index in enumerate(CONVOLUTIONS, 1):
        weight, bias = (weights[f"features.{index}.{name}"].float() for name in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, padding=1).relu()
        if position in (2, 4, 7, 10):
            x = F.max_pool2d(x, 2)
    return x.mean((2, 3))


def test_vgg16_features_are_the_mean_of_the_last_convolution(random_vgg16):
    images = random_images(0)
    found = VGG16Features(random_vgg16)(images)
    assert (found.shape, found.dtype) == ((COUNT, 512), torch.float64)
    assert found.std() > 0.01
    torch.testing.assert_close(found.float(), vgg16_by_hand(images, torch.load(random_vgg16)), rtol=1e-4, atol=1e-5)


def test_the_distance_on_vgg16_is_never_called_fid(random_vgg16):
    distance = FrechetVGG16Distance(random_vgg16)
    distance.update(random_images(0), real=True)
    distance.update(random_images(1), real=False)
    assert distance.compute() > 0
    assert (distance.label, distance.n) == ("FD-VGG16", COUNT)


def test_weights_of_a_whole_vgg16_are_taken_too(random_vgg16, tmp_path):
    weights = {
        **torch.load(random_vgg16),
        "classifier.0.weight": torch.zeros(4, 4),
        "classifier.0.bias": torch.zeros(4),
    }
    torch.save(weights, tmp_path / "whole.pth")
    images = random_images(0)[:1]
    assert torch.equal(VGG16Features(tmp_path / "whole.pth")(images), VGG16Features(random_vgg16)(images))


def test_images_that_are_too_small_for_vgg16_raise(random_vgg16):
    with pytest.raises(ValueError, match=r"at least 16 x 16 pixels, but got shape \(3, 3, 15, 40\)"):
        VGG16Features(random_vgg16)(random_images(0, (15, 40)))


# Files


def test_the_path_goes_before_the_variable_and_that_before_the_cache(hub, tmp_path, monkeypatch):
    cache, downloads = hub
    cache.mkdir(parents=True)
    given, named, cached = tmp_path / "given.pth", tmp_path / "named.pth", cache / FILE
    for path in (given, named, cached):
        path.touch()
    assert inception_file(None) == cached
    monkeypatch.setenv(INCEPTION_VARIABLE, str(named))
    assert inception_file(None) == named
    assert inception_file(str(given)) == given
    assert not downloads


def test_missing_weights_are_downloaded_to_the_cache_and_checked(hub, monkeypatch):
    cache, _ = hub

    def download(url, target, hash_prefix):
        assert (url, hash_prefix) == (URL, "6726825d")
        Path(target).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert inception_file(None).read_bytes() == b"weights"
    assert inception_file(None).parent == cache


def assert_remedies(message, cache):
    for part in (URL, "weights_path=", INCEPTION_VARIABLE, str(cache / FILE), "FrechetVGG16Distance"):
        assert part in message


@pytest.mark.parametrize("reason", [URLError("no route to host"), RuntimeError("invalid hash value"), TimeoutError()])
def test_offline_without_weights_the_error_names_the_url_and_the_remedies(hub, reason, monkeypatch):
    def download(*args, **options):
        raise reason

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(FileNotFoundError, match="weights that define FID are not here, and could not be") as raised:
        FrechetInceptionDistance()
    assert str(reason) in str(raised.value)
    assert_remedies(str(raised.value), hub[0])


def test_a_path_that_leads_nowhere_is_named_and_nothing_else_is_taken(hub, tmp_path, monkeypatch):
    missing = tmp_path / "missing.pth"
    with pytest.raises(FileNotFoundError, match=r"weights_path is '.*missing\.pth'") as raised:
        FrechetInceptionDistance(missing)
    assert_remedies(str(raised.value), hub[0])
    monkeypatch.setenv(INCEPTION_VARIABLE, str(missing))
    with pytest.raises(FileNotFoundError, match=rf"{INCEPTION_VARIABLE} is '.*missing\.pth'"):
        FrechetInceptionDistance()
    with pytest.raises(FileNotFoundError, match=r"weights_path is '.*missing\.pth'"):
        FrechetVGG16Distance(missing)
    assert not hub[1]


def test_weights_of_another_network_are_refused(random_vgg16, tmp_path):
    with pytest.raises(
        ValueError, match=r"vgg16\.pth does not hold the weights of pytorch-fid's InceptionV3: .*Missing"
    ):
        FrechetInceptionDistance(random_vgg16)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of torchvision's VGG16: .*Missing"):
        FrechetVGG16Distance(tmp_path / "other.pth")


def test_after_a_refusal_pytorch_fid_downloads_as_before(random_vgg16):
    from pytorch_fid import inception

    before = inception.load_state_dict_from_url
    with pytest.raises(ValueError, match="does not hold"):
        FrechetInceptionDistance(random_vgg16)
    assert inception.load_state_dict_from_url is before


def test_a_file_that_is_no_file_of_weights_raises_and_is_named(random_vgg16, tmp_path):
    for name, content in {
        "page.pth": b"<html>not found</html>",
        "empty.pth": b"",
        "cut.pth": random_vgg16.read_bytes()[:100_000],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a file of weights"):
            read_weights(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth must hold the tensors of a network by name"):
        read_weights(tmp_path / "list.pth")


# What is not installed


def test_without_pytorch_fid_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pytorch-fid here.*pip install pytorch-fid"):
        FrechetInceptionDistance()


def test_without_torchmetrics_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_mtadam.metrics")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs torchmetrics here.*pip install torchmetrics"):
        importlib.import_module("lightning_mtadam.metrics")
